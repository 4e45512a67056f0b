"""A long text: the Rust book of a Rust toolchain (component rust-docs), which is licensed under MIT or Apache-2.0.

    from book import book_ids
"""

import html.parser
import pathlib
import re
import subprocess

# The docs of another version are another text.
TOOLCHAIN = "1.95.0"


class Chapter(html.parser.HTMLParser):
    """Collects the text of a chapter's <main>."""

    BLOCKS = {"p", "h1", "h2", "h3", "h4", "li", "pre", "figcaption", "tr", "blockquote"}
    SKIPPED = {"script", "style", "button"}

    def __init__(self):
        super().__init__()
        self.parts, self.main, self.skipped = [], False, 0

    def handle_starttag(self, tag, attributes):
        self.main = self.main or tag == "main"
        self.skipped += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.parts.append("\n\n" if tag != "li" else "\n")

    def handle_endtag(self, tag):
        self.main = self.main and tag != "main"
        self.skipped -= tag in self.SKIPPED

    def handle_data(self, data):
        if self.main and not self.skipped:
            self.parts.append(data)


def book_text():
    rustc = subprocess.run(["rustc", f"+{TOOLCHAIN}", "--print", "sysroot"], capture_output=True, text=True, check=True)
    directory = pathlib.Path(rustc.stdout.strip()) / "share/doc/rust/html/book"
    texts = []
    for path in sorted(directory.glob("ch*.html")):
        chapter = Chapter()
        chapter.feed(path.read_text())
        texts.append(re.sub(r"\n{3,}", "\n\n", "".join(chapter.parts)).strip())
    return "\n\n".join(text for text in texts if len(text) > 500)


def book_ids(tokenizer):
    """The book's token ids by a tokenizers.Tokenizer."""
    return tokenizer.encode(book_text(), add_special_tokens=False).ids


if __name__ == "__main__":
    text = book_text()
    print(len(text), text[:300], "...", text[200_000:200_600], sep="\n")
