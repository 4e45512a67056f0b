"""Writes numbers.json: numbers, and lists and dicts of them, as Python, Jinja and transformers write them.

    pip install transformers==5.24.0 jinja2==3.1.6
    python crates/rekindle-data/goldens/numbers/make.py

`values` are JSON, which json.loads reads; a template gets each as `v`. `literals` are templates without a value.
"""

import json
import platform
from pathlib import Path

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

VALUES = [
    # Floats at the borders of the exponent, and with many digits.
    "1e-05", "0.0001", "0.00012345", "9.999e-05", "1e16", "9999999999999998.0", "1.5e16", "3e20", "123456789012345680.0",
    "1e22", "1e23", "1.7976931348623157e308", "5e-324", "2.2250738585072014e-308", "0.1", "0.30000000000000004",
    "100.0", "1e2", "-2.5", "-0.0", "0.0", "1e100", "1.0e-10", "-1e-7", "12345.678",
    # Integers within and beyond 64 and 128 bits.
    "0", "-0", "7", "-1", "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616",
    "-9223372036854775808", "-9223372036854775809", "25000000000000000000",
    "170141183460469231731687303715884105727", "170141183460469231731687303715884105728",
    "340282366920938463463374607431768211456", "-340282366920938463463374607431768211457",
    "123456789012345678901234567890123456789012345678901234567890",
    # Nested, beside other values.
    '[1e-05, 3e+20, 25000000000000000000, -0.0, true, null, "a"]',
    '{"rate": 1e-05, "wei": 25000000000000000000, "on": false, "none": null, "list": [1e16, {"x": 2.0}], "it\'s": "\\"\\u00e4"}',
    "[]", "{}", "[[]]", "true", "false", "null",
    '"1e-05"', '["a\\nb", "\\u00a0\\u200b", "\\ud83e\\udd80", "it\'s", "\\\\"]',
]
TEMPLATES = [
    "{{ v }}", "{{ v | string }}", "{{ v ~ '' }}", "{{ '<' ~ v ~ '>' ~ v }}", "{{ v | tojson }}", "{{ v | tojson(indent=2) }}",
    "{{ v | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}", "{{ [v, {'k': v}] }}",
    "{{ [v] | join(',') }}", "{{ [v, v] | map('string') | join(' ') }}", "{{ v | trim }}", "{{ v | upper }}", "{{ v | lower }}",
    "{{ '{} and {}'.format(v, 1) }}", "{{ '%s' | format(v) }}", "{% set x = v %}{{ x }}",
    "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(v) }}", "{{ v is number }} {{ v is integer }} {{ v is float }}",
    "{{ v is mapping }} {{ v is string }} {{ v is none }} {{ v is boolean }}", "{{ v == v }} {{ v is iterable and v is not string }}",
]
LITERALS = [
    "{{ 1e-5 }}", "{{ 1e-5 ~ '' }}", "{{ 1e16 }}", "{{ 123456789.0 * 1e9 }}", "{{ [1e-5, 1e16, -0.0] }}", "{{ 1 / 3 }}", "{{ 4 / 2 }}",
    "{{ 7 // 2 }} {{ 7.0 // 2 }} {{ -7 % 3 }} {{ 2 ** 0.5 }}", "{{ 2 ** 70 }}", "{{ 9223372036854775807 + 1 }}",
    "{{ 1e308 * 10 }} {{ -1e308 * 10 }}", "{{ [1e308 * 10] | tojson }}", "{{ 1e-5 | tojson }}", "{{ 3e20 | string }}",
    "{{ 1.0 | int }} {{ '1e-5' | float }} {{ 2.675 | round(2) }} {{ 2.5 | round }}", "{{ {'a': 1e-5, 2: none, true: false} }}",
    "{{ {2: 1e-5, none: 1, 1.5: 2} | tojson }}", "{{ (1e-5,) }} {{ (1, 2.0) }} {{ () }}", "{{ 1e-5 if 1e-5 ~ 'x' == '1e-05x' else 'no' }}",
    "{{ 'a' ~ 1 * 2 ~ 'b' }}", "{{ -1e-7 ~ -2 }}", "{{ range(3) | list }}",
    "{{ 'a~b' ~ \"c'~\" ~ 1.5e300 }}", "{{ [1e-5] ~ {'k': 1e16} }}", "{{ (1e-5 ~ 'x')|length }}", "{{ true ~ none ~ 1 }}",
    "{%- for x in [1e-5, 2] -%}{{ loop.index ~ ':' ~ x }} {% endfor %}", "{{ missing ~ 'x' }}{{ missing }}", "{{ [missing is defined, none] }}",
]  # fmt: skip


def render(template, message):
    (text,), _ = render_jinja_template([[message]], chat_template=template)
    return text


def attempt(template, message):
    try:
        return render(template, message)
    except (jinja2.TemplateError, TypeError, ValueError, OverflowError):
        return None


def main():
    def texts(value):
        message = {"role": "user", "content": "", "value": json.loads(value)}
        # A key that is null is left out of a message.
        return [attempt("{%- set v = messages[0].get('value') -%}" + template, message) for template in TEMPLATES]

    golden = {
        "versions": {"python": platform.python_version(), "transformers": transformers.__version__, "jinja2": jinja2.__version__},
        "templates": TEMPLATES,
        "values": [{"json": value, "texts": texts(value)} for value in VALUES],
        "literals": [{"template": template, "text": attempt(template, {"role": "user", "content": ""})} for template in LITERALS],
    }
    out = json.dumps(golden, indent=1, ensure_ascii=False)
    (Path(__file__).parent / "numbers.json").write_text(out + "\n", encoding="utf-8")


main()
