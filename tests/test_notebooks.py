"""Every notebook runs from top to bottom, and is stored with the outputs of such a run."""

import re
import sys
import warnings
from pathlib import Path

import nbformat
import pytest

with warnings.catch_warnings():
    # Deprecations within the Jupyter packages themselves, at import, depend on their releases and are not ours.
    warnings.simplefilter("ignore", DeprecationWarning)
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MAX_BYTES = 700_000
A_LOCAL_PATH = re.compile(r"(?<![\w/.:])/(?:home|root|tmp|usr|opt|var|mnt|work|Users|private)/|\b[A-Z]:\\")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output):
    """Whatever an output shows as text."""
    if output.output_type == "stream":
        return output.text
    return "\n".join(str(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def complaints(notebook):
    """What no output should hold: errors, anything on stderr (warnings go there), paths of a machine."""
    found = []
    for number, cell in enumerate(code_cells(notebook), 1):
        for output in cell.outputs:
            text = text_of(output)
            wrong = output.output_type == "error" or output.get("name") == "stderr"
            if wrong or "Warning" in text or "Traceback" in text or A_LOCAL_PATH.search(text):
                found.append(f"code cell {number}: {output.output_type} {text[:300]!r}")
    return found


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run a notebook in place, in an empty folder, by the interpreter of this test; return what it left there."""
    for variable in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))  # none of the user's settings, nothing left
    cwd = tmp_path / "empty"
    cwd.mkdir()

    def execute(notebook):
        # With no folder to look into, "python3" is ipykernel's own specification: the running interpreter.
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        client = NotebookClient(
            notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(cwd)}}
        )
        client.km = manager  # not an argument, for then the client would leave the kernel and its sockets open
        client.execute()
        return list(cwd.iterdir())

    return execute


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_top_to_bottom(path, execute):
    stored, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    for cell in code_cells(notebook):
        cell.outputs = []
    assert execute(notebook) == []
    assert complaints(notebook) == []
    kinds = [
        [[(o.output_type, sorted(o.get("data", {}))) for o in cell.outputs] for cell in code_cells(n)]
        for n in (stored, notebook)
    ]
    assert kinds[0] == kinds[1]  # what is stored came from these cells


@each_notebook
def test_a_notebook_is_stored_with_clean_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert complaints(notebook) == []
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)
    assert path.stat().st_size < MAX_BYTES


@each_notebook
def test_a_notebook_holds_nothing_of_the_machine_that_ran_it(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell.metadata == {} for cell in notebook.cells)  # no timing
    assert not A_LOCAL_PATH.search("\n".join(cell.source for cell in notebook.cells))


def test_there_are_notebooks():
    assert NOTEBOOKS


def new_notebook(*sources):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def test_the_kernel_is_this_interpreter_and_a_false_claim_in_a_cell_fails(execute):
    notebook = new_notebook("import sys; print(sys.executable)", "assert 1 + 1 == 3", "print('not reached')")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook)
    said, failed, after = (cell.outputs for cell in notebook.cells)
    assert Path(said[0].text.strip()).resolve() == Path(sys.executable).resolve()
    assert [output.output_type for output in failed] == ["error"]
    assert after == []


def test_complaints_find_what_is_wrong():
    stream = {"output_type": "stream", "name": "stdout", "text": "bound -23.5\n"}
    wrong = [
        {**stream, "name": "stderr"},
        {**stream, "text": "UserWarning: no\n"},
        {**stream, "text": "see /home/somebody/x.py\n"},
        {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []},
        {"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": "'/tmp/x'"}},
    ]
    for output, expected in [(stream, 0), *((output, 1) for output in wrong)]:
        notebook = new_notebook("...")
        notebook.cells[0].outputs = [nbformat.from_dict(output)]
        assert len(complaints(notebook)) == expected, output
