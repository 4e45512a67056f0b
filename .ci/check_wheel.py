"""Checks a wheel that is installed into this environment: metadata, tags and the command."""

import email
import os
import pathlib
import re
import subprocess
import sys
import zipfile

path = pathlib.Path(sys.argv[1])
wheel = zipfile.ZipFile(path)
cargo = pathlib.Path("Cargo.toml").read_text()
version = re.search(r'^\[workspace\.package\]\nversion = "([^"]+)"', cargo, re.MULTILINE)[1]


def parsed(name):
    return email.message_from_bytes(wheel.read(f"rekindle-{version}.dist-info/{name}"))


metadata = parsed("METADATA")
assert (metadata["Name"], metadata["Version"]) == ("rekindle", version), metadata
assert metadata["License-Expression"] == "MIT OR Apache-2.0", metadata["License-Expression"]
assert metadata.get_payload().startswith("# Rekindle"), "the description is the README"
assert set(metadata.get_all("License-File")) == {"LICENSE-MIT", "LICENSE-APACHE"}, metadata.get_all("License-File")

command = f"rekindle-{version}.data/scripts/rekindle"
assert command in wheel.namelist(), wheel.namelist()
tag = parsed("WHEEL")["Tag"]
assert tag.startswith("py3-none-") and tag in path.name, f"{tag}: the wheel fits every Python 3"

# The tag promises that the command runs with glibc of its version: no symbol of a newer one is needed.
glibc = re.search(r"manylinux_(\d+)_(\d+)_", tag)
needed = {tuple(map(int, found)) for found in re.findall(rb"\0GLIBC_(\d+)\.(\d+)", wheel.read(command))}
if glibc is None:
    assert tag.startswith("py3-none-linux_"), tag
    print(f"the tag {tag} promises nothing about other machines")
else:
    assert needed and max(needed) <= tuple(map(int, glibc.groups())), (max(needed), tag)

installed = pathlib.Path(sys.prefix, "bin", "rekindle")
environment = {**os.environ, "HF_HUB_OFFLINE": "1"}


def said(*arguments):
    return subprocess.run([installed, *arguments], check=True, capture_output=True, text=True, env=environment).stdout


assert said("--version") == f"rekindle {version}\n", said("--version")
assert "Start here:" in said("--help")
print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB, glibc {'.'.join(map(str, max(needed)))}; {said('--version').strip()}")
