"""README.md's Python runs as it stands, on a small checkpoint in place of the reader's."""

import pathlib
import re

from hf_directory import released

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_code_of_the_readme_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    library = [block for block in blocks if "q3n" in block]
    assert len(library) == 2, "the first screen has the library, then a training step"
    released(tmp_path / "given")
    code = "\n".join(library)
    for stands_for, path in (
        ("path/to/config.json", tmp_path / "given" / "config.json"),
        ("path/to/directory", tmp_path / "given"),
        ("elsewhere", tmp_path / "written"),
    ):
        assert f'"{stands_for}"' in code
        code = code.replace(f'"{stands_for}"', repr(str(path)))
    names = {}
    exec(compile(code, str(README), "exec"), names)
    assert (tmp_path / "written" / "config.json").is_file()
    assert [len(new) for new in names["new"]] == [16]
    assert names["loss"].shape == ()
    assert {"ce", "mtp_ce", "balance_loss"} <= set(names["metrics"])
