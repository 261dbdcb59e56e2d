"""Files written through `command` appear whole or not at all."""

import resource
import signal

import pytest

from qwen3next_jax.command import friendly_errors, replacing, write_atomic


@pytest.fixture
def small_files():
    """Writing more than 1024 bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_partial_one(tmp_path, small_files):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(OSError, match=f"File too large: '{path}'"):
        write_atomic(path, "new" * 1000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_no_partial_file(tmp_path):
    def write():
        with replacing(tmp_path / "file") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


def test_a_library_s_word_on_what_to_install_is_told_and_a_failed_import_keeps_its_traceback():
    with pytest.raises(SystemExit, match="error: Please install gcsfs"), friendly_errors():
        raise ImportError("Please install gcsfs to access Google Storage")
    with pytest.raises(ImportError, match="No module named 'nowhere'"), friendly_errors():
        import nowhere  # type: ignore[import-not-found]  # noqa: F401
