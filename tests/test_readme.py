"""Both READMEs show the same commands and the same output, link to each other, and name files that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _commands(text: str) -> list[str]:
    """Lines of code blocks that start a program, without their comments."""
    lines = (line for block in _blocks(text) for line in block.splitlines())
    return [line.partition(" #")[0].strip() for line in lines if re.match(r"(make|fiveply|python|torchrun) ", line)]


def test_both_show_the_same_commands() -> None:
    assert len(_commands(ENGLISH)) >= 9
    assert _commands(CHINESE) == _commands(ENGLISH)


def test_both_show_the_same_output() -> None:
    def output(text: str) -> list[str]:
        return [block for block in _blocks(text) if re.match(r"1\. Train|dp=|zb: ", block)]

    assert len(output(ENGLISH)) == 3
    assert output(CHINESE) == output(ENGLISH)


def test_they_link_to_each_other() -> None:
    assert "](README.zh-CN.md)" in ENGLISH.splitlines()[2]
    assert "](README.md)" in CHINESE.splitlines()[2]


def test_linked_files_exist() -> None:
    for text in (ENGLISH, CHINESE):
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert (ROOT / link).exists(), link
