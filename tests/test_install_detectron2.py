"""tools/install_detectron2.py: what it refuses, what its wheel holds, and what it leaves alone.

Everything runs offline, on a wheel of a few bytes made here.
"""

import base64
import csv
import hashlib
import importlib.util
import io
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "install_detectron2.py"


def load_script():
    """Import the script as a module, by its path: tools/ is no package."""
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()

SOURCE_MEMBERS = {
    "detectron2/__init__.py": '# a comment\n__version__ = "0.7.2"\n',
    "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "compiled for Linux",
    "detectron2/_C.cp310-win_amd64.pyd": "compiled for Windows",
    "detectron2/_Constants.py": "KEPT = True\n",
    "detectron2/layers/__init__.py": "from .ops import ANSWER\n",
    "detectron2/layers/ops.py": "ANSWER = 42\n",
    "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
    "tools/__init__.py": "",
    "tools/train_net.py": "raise RuntimeError\n",
    "sal_detectron2-0.7.2.dist-info/LICENSE": "Apache License\n",
    "sal_detectron2-0.7.2.dist-info/METADATA": "Name: sal-detectron2\nRequires-Dist: numpy<2\n",
    "sal_detectron2-0.7.2.dist-info/RECORD": "",
}


def write_source(path: Path, members: dict[str, str] = SOURCE_MEMBERS) -> Path:
    """Write a wheel that is laid out as the one on PyPI is."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny stand-in for the wheel of sal-detectron2."""
    return write_source(tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl")


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """An interpreter without Detectron2, without pip and without anything else."""
    folder = tmp_path / "bare"
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def run_script(*arguments, python=sys.executable, **options) -> subprocess.CompletedProcess:
    """Run the script as a user does, in a process of its own."""
    command = [str(python), str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def site_packages(python: Path) -> Path:
    """Return the folder that pip installs into."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([str(python), "-c", code], text=True).strip())


def the_only_error(result: subprocess.CompletedProcess) -> str:
    """Return what stderr says, once it is sure to be one line and no traceback."""
    assert result.returncode == 1, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("install_detectron2: error: ")
    return lines[0]


# A wrong file


def test_a_wrong_hash_installs_nothing(source, bare_python):
    before = sorted(site_packages(bare_python).rglob("*"))
    error = the_only_error(run_script("--wheel", source, python=bare_python))
    assert sorted(site_packages(bare_python).rglob("*")) == before
    assert "nothing was installed" in error
    assert hashlib.sha256(source.read_bytes()).hexdigest() in error
    assert script.SOURCE_SHA256 in error


def test_a_wrong_hash_builds_nothing(source, tmp_path):
    output = tmp_path / "output"
    the_only_error(run_script("--wheel", source, "--output", output))
    assert not output.exists()


def test_one_changed_byte_is_noticed(source):
    expected = hashlib.sha256(source.read_bytes()).hexdigest()
    script.check_sha256(source, expected)
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    source.write_bytes(content)
    with pytest.raises(script.InstallError, match="SHA-256"):
        script.check_sha256(source, expected)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (None, "as a wheel"),  # no zip file at all, such as an error page of a proxy
        ({"other/__init__.py": ""}, "not the wheel of sal-detectron2"),
        ({"detectron2/__init__.py": ""}, "LICENSE"),  # may not be handed on without it
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, members, message):
    path = tmp_path / "some.whl"
    if members is None:
        path.write_text("<html>not found</html>")
    else:
        write_source(path, members)
    with pytest.raises(script.InstallError, match=message) as caught:
        script.repack(path, tmp_path / "output")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "output").exists()


# The repacked wheel


def test_the_repacked_wheel_holds_the_python_package_alone(source, tmp_path):
    wheel = script.repack(source, tmp_path / "output")
    assert wheel.name == "detectron2-0.6+a59f0563-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licence = archive.read(f"{script.DIST_INFO}/LICENSE").decode()
        init = archive.read("detectron2/__init__.py").decode()
    assert {name for name in names if name.startswith("detectron2/")} == {
        "detectron2/__init__.py",
        "detectron2/_Constants.py",
        "detectron2/layers/__init__.py",
        "detectron2/layers/ops.py",
        "detectron2/model_zoo/configs/Base.yaml",
    }
    assert {name.split("/")[0] for name in names} == {"detectron2", script.DIST_INFO}
    assert licence == "Apache License\n"
    assert init.startswith('# a comment\n__version__ = "0.6"')


def test_record_lists_every_file_with_its_hash_and_size(source, tmp_path):
    with zipfile.ZipFile(script.repack(source, tmp_path)) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    name_of_record = f"{script.DIST_INFO}/RECORD"
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(contents[name_of_record].decode()))}
    assert set(rows) == set(contents)
    assert rows.pop(name_of_record) == ["", ""]
    for name, (digest, size) in rows.items():
        algorithm, _, encoded = digest.partition("=")
        assert algorithm == "sha256"
        decoded = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        assert decoded == hashlib.sha256(contents[name]).digest()
        assert not encoded.endswith("=")
        assert int(size) == len(contents[name])


def test_the_metadata_asks_for_ranges_without_what_is_not_needed():
    lines = script.metadata().splitlines()
    assert "Name: detectron2" in lines
    assert "Version: 0.6+a59f0563" in lines
    required = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist" in line]
    assert "numpy" in required
    assert "setuptools<81" in required
    assert not [name for name in required if name.startswith(("black", "torch")) or "==" in name]


def test_the_same_source_gives_the_same_bytes(source, tmp_path):
    first = script.repack(source, tmp_path / "first").read_bytes()
    # The order of the members and the time of packing are no part of what is packed.
    other = write_source(tmp_path / "other.whl", dict(reversed(SOURCE_MEMBERS.items())))
    assert script.repack(other, tmp_path / "second").read_bytes() == first


def test_pip_installs_owns_and_removes_the_wheel(source, tmp_path, bare_python):
    wheel = script.repack(source, tmp_path)

    def pip(*arguments):
        command = [sys.executable, "-m", "pip", "--python", str(bare_python), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)

    pip("install", "--quiet", "--no-deps", "--no-index", str(wheel))
    found = script.find_detectron2(str(bare_python))
    package = site_packages(bare_python) / "detectron2"
    assert found == script.Found(path=str(package / "__init__.py"), version="0.6", error=None)
    code = "from detectron2.layers import ANSWER; print(ANSWER)"
    assert subprocess.check_output([str(bare_python), "-c", code], text=True) == "42\n"
    pip("uninstall", "--quiet", "--yes", "detectron2")
    assert not package.exists()
    assert script.find_detectron2(str(bare_python)) is None


# A Detectron2 that is there already


def fake_detectron2(folder: Path, text: str) -> Path:
    """Write a package ``detectron2`` into ``folder`` and return the package's folder."""
    package = folder / "detectron2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    return package


def test_an_importable_detectron2_is_left_alone(tmp_path, bare_python):
    package = fake_detectron2(tmp_path / "own", '__version__ = "9.9"\n')
    # The file named does not exist: it would be an error if it were looked at.
    result = run_script(
        *("--wheel", tmp_path / "missing.whl"),
        python=bare_python,
        env={"PYTHONPATH": str(package.parent)},
    )
    assert result.returncode == 0, result.stderr
    assert "9.9" in result.stdout
    assert str(package) in result.stdout
    assert "left alone" in result.stdout


def test_a_broken_detectron2_is_left_alone_and_named(tmp_path, bare_python):
    package = fake_detectron2(tmp_path / "own", "import no_such_module\n")
    error = the_only_error(run_script(python=bare_python, env={"PYTHONPATH": str(package.parent)}))
    assert "No module named 'no_such_module'" in error
    assert str(package) in error
    assert "pip uninstall detectron2" in error


def test_what_detectron2_prints_while_it_is_imported_does_not_matter(tmp_path, monkeypatch):
    fake_detectron2(tmp_path, 'print("hello")\n__version__ = "9.9"\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert script.find_detectron2().version == "9.9"


def test_a_source_checkout_in_the_current_folder_does_not_count(source, tmp_path, bare_python):
    fake_detectron2(tmp_path / "checkout", '__version__ = "9.9"\n')
    result = run_script("--wheel", source, python=bare_python, cwd=tmp_path / "checkout")
    assert "SHA-256" in the_only_error(result)


def test_a_folder_that_only_has_the_name_does_not_count(tmp_path, monkeypatch, bare_python):
    (tmp_path / "detectron2").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert script.find_detectron2(str(bare_python)) is None


# Messages


def test_a_missing_wheel_is_named(tmp_path):
    missing = tmp_path / "missing.whl"
    error = the_only_error(run_script("--wheel", missing, "--output", tmp_path / "output"))
    assert str(missing) in error
    assert "--wheel" in error


def test_a_missing_constraints_file_is_named(tmp_path):
    missing = tmp_path / "missing.txt"
    error = the_only_error(run_script("--constraint", missing))
    assert str(missing) in error
    assert "constraints.txt" in error


def test_an_interpreter_without_pip_is_named(bare_python):
    error = the_only_error(run_script(python=bare_python))
    assert "ensurepip" in error
    assert str(bare_python.parent) in error


def test_help_teaches():
    result = run_script("--help")
    assert result.returncode == 0
    for part in ("--wheel", "--output", "--constraint", "pip uninstall", "examples:"):
        assert part in result.stdout
