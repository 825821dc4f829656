"""Pages that verbs write, and files that they leave alone."""

import pytest

from llama_lab.errors import RunError
from llama_lab.pages import GENERATOR, check_page, write_page

PAGE = f"<!doctype html><html><head>{GENERATOR}</head>"


def test_a_page_is_written_into_new_folders_and_over_itself(tmp_path):
    file = tmp_path / "new" / "page.html"
    for text in (f"{PAGE}one", f"{PAGE}two"):
        check_page(file)
        write_page(file, text)
        assert file.read_text() == text
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("kind", ["rows", "another page", "folder", "broken link"])
def test_what_is_no_page_of_ours_is_not_overwritten(tmp_path, kind):
    file = tmp_path / "there"
    if kind == "folder":
        file.mkdir()
    elif kind == "broken link":
        file.symlink_to("nowhere")
    else:
        file.write_text('{"prompt": "a"}' if kind == "rows" else "<!doctype html><html>")
    for refused in (lambda: check_page(file), lambda: write_page(file, PAGE)):
        with pytest.raises(RunError, match="is there already, and no page of llama_lab's"):
            refused()


def test_a_page_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is no folder that can be written into"):
        check_page(tmp_path / "file" / "page.html")
