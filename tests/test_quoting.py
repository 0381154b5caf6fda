"""What is printed to be typed can be typed: through a shell and Hydra comes back what it was made of."""

from __future__ import annotations

import random
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from runner.text import format_override, quote_override
from tests.conftest import composed

PARTS = (
    *(
        "abcXYZ019 _-./%#?\\'\"$;&[]{}()*:@=,+~!^|<>`\t\n\r\x01\x7f",
        "é",
        "e\u0301",
        "漢",
        "🎉",
        "\u00a0",
        "\u2028",
        "\u202e",
    ),
    *("\\\\", "\\'", "''", "${", "${x}", "\\${", "$(x)", "$$", "..", "//", "%41", "null", "1e3", "'\\''"),
)
CHARS = (*PARTS[0], *PARTS[1:])
# Each is something else to Hydra, or to a shell, where it stands without quotes.
WORDS = (
    *(
        "null",
        "true",
        "false",
        "Off",
        "YES",
        "nan",
        "-nan",
        "inf",
        "-inf",
        "1",
        "-1",
        "+1",
        "1_000",
        "1e3",
        ".5",
        "1.",
        "0x1",
    ),
    *(
        "",
        " ",
        "\\",
        "'",
        '"',
        "\\'",
        "a\\",
        "\\\\",
        "a b",
        " a",
        "a ",
        "~",
        "~/x",
        "-",
        "--x",
        "-c",
        "a=b",
        "x,y",
        "a:b",
        "a: b",
    ),
    *(
        "{a:1}",
        "[1]",
        "[]",
        "{}",
        "(",
        "'q'",
        "2026-11-21",
        "12:30",
        "1:2:3",
        "${nope}",
        "\\${nope}",
        "$HOME",
        "`id`",
        "#",
        "!",
    ),
    *(
        "/a/b",
        "./a",
        "../a",
        "a/b-c.d_e",
        "$'\\n'",
        "a\nb",
        "range(1)",
        "choice(a,b)",
        "glob(*)",
        "e5",
        "_1",
        "/1",
        "...",
    ),
)


def ugly(rng: random.Random) -> str:
    return "".join(rng.choice(CHARS) for _ in range(rng.randint(1, 14)))


def test_a_shell_and_hydra_read_what_was_meant() -> None:
    rng = random.Random(0)
    values = [*WORDS, *(ugly(rng) for _ in range(300)), *(f"/{ugly(rng)}/outputs" for _ in range(200))]
    typed = [quote_override("dir", value) for value in values]
    # One line each, that no terminal takes for a command.
    assert all(line.isprintable() for line in typed)
    script = "\n".join(f"printf '%s\\0' {line}" for line in typed)
    out = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    words = out.decode().split("\0")[:-1]
    assert words == [format_override("dir", value) for value in values]
    parser = OverridesParser.create()
    for value, word in zip(values, words, strict=True):
        config = OmegaConf.create({"dir": None})
        OmegaConf.update(config, "dir", parser.parse_override(word).value(), merge=True)
        assert config.dir == value, word


@pytest.mark.parametrize("seed", range(3))
def test_the_real_configuration_reads_it(seed: int) -> None:
    value = "".join(random.Random(seed).sample(CHARS, 40))
    assert composed(format_override("root", value)).root == value


def test_what_is_no_text_is_written_as_it_is_and_a_plain_path_stays_plain() -> None:
    assert quote_override("train.steps", 80) == "train.steps=80"
    assert quote_override("dir", "outputs/default/lr_1e-3-a") == "dir=outputs/default/lr_1e-3-a"
    assert quote_override("dir", "a b") == """'dir='"'"'a b'"'"''"""
