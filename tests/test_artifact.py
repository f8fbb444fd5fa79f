"""Artifacts: nothing half written, nothing foreign overwritten, no damage unnoticed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gammac.diagnostics import CompileError
from gammac.runtime import staging as staging_module
from gammac.runtime.artifact import MANIFEST, is_artifact, open_artifact, seal
from gammac.runtime.manifest import Manifest, parse_manifest
from gammac.runtime.staging import check_writable, staging

PLAIN = Manifest(
    model="tiny", model_digest="sha256:00", target="cpu-x86-avx512", kind="decoder", emitter="onnx",
    context=256, payload_bits=3.0, true_bits=3.31, whole_model_bits=4.0, budgets=("3",),
    allocation={"b": "w3g64", "a": "w4g64"}, predicted={"seconds_per_token": 0.002},
    not_quantized={"head": "tied to the embedding"}, fallbacks={"a": "w4g128 asked for, 96 divides"},
    library="libgammac_op.so", tools={"onnx": "1.20"},
)  # fmt: skip

FILES = {
    "model.onnx": b"graph",
    "model.onnx.data": bytes(range(256)) * 8,
    "libgammac_op.so": b"\x7fELF",
    "ir/00-capture.gir": b"module @tiny {}",
    "tokenizer.json": b"{}",
}


def fill(folder: Path, manifest: Manifest = PLAIN) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    seal(folder, manifest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with staging(tmp_path / "out") as work:
        fill(work)
    return tmp_path / "out"


def complaint(folder: Path) -> str:
    with pytest.raises(CompileError) as caught:
        open_artifact(folder)
    return str(caught.value)


def edit(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_manifest_reads_back(folder: Path) -> None:
    artifact = open_artifact(folder)
    assert artifact.manifest == replace(PLAIN, files=artifact.manifest.files)
    assert parse_manifest(artifact.manifest.to_json()) == artifact.manifest
    assert artifact.size_bytes == sum(map(len, FILES.values()))
    assert artifact.library == folder / "libgammac_op.so"


def test_equal_artifacts_have_equal_manifests(tmp_path: Path, folder: Path) -> None:
    shuffled = replace(PLAIN, allocation=dict(reversed(PLAIN.allocation.items())))
    with staging(tmp_path / "again") as work:
        fill(work, shuffled)
    text = (folder / MANIFEST).read_text()
    assert (tmp_path / "again" / MANIFEST).read_text() == text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, -1])
def test_a_flipped_bit_is_found(folder: Path, name: str, where: int) -> None:
    content = bytearray((folder / name).read_bytes())
    content[where] ^= 1
    (folder / name).write_bytes(content)
    assert f"{name} has changed" in complaint(folder)
    open_artifact(folder, verify=False)


@pytest.mark.parametrize("name", FILES)
def test_missing_and_shortened_files_are_found(folder: Path, name: str) -> None:
    (folder / name).write_bytes(FILES[name][:-1])
    assert f"{name} has {len(FILES[name]) - 1} bytes" in complaint(folder)
    (folder / name).unlink()
    assert f"{name} is missing" in complaint(folder)
    with pytest.raises(CompileError, match="missing"):
        open_artifact(folder, verify=False)


def test_any_changed_byte_of_the_manifest_is_an_error_or_harmless(folder: Path) -> None:
    path = folder / MANIFEST
    text = path.read_bytes()
    before = open_artifact(folder).manifest
    for position in range(0, len(text), 7):
        path.write_bytes(text[:position] + bytes([text[position] ^ 1]) + text[position + 1 :])
        try:
            after = open_artifact(folder).manifest
        except CompileError:
            continue
        # a figure or a name may differ; what is run may not
        assert after.files == before.files


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"format": "gammac-artifact"}', "\x00\xff"])
def test_a_garbage_manifest_is_damaged(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    assert "manifest.json" in complaint(folder) or "format version" in complaint(folder)


def test_a_manifest_of_the_wrong_types_is_damaged(folder: Path) -> None:
    changes = ({"kind": "oracle"}, {"context": -1}, {"payload_bits": "3"}, {"budgets": "3"}, {"files": []})
    for change in changes:
        good = (folder / MANIFEST).read_text()
        edit(folder, **change)
        assert "manifest.json is damaged" in complaint(folder), change
        (folder / MANIFEST).write_text(good)


def test_a_later_version_says_what_to_do(folder: Path) -> None:
    edit(folder, format_version=99, gammac="7.0")
    assert "format version 99" in complaint(folder) and "7.0" in complaint(folder)


def test_not_an_artifact(tmp_path: Path) -> None:
    assert "there is no folder" in complaint(tmp_path / "nowhere")
    assert "is not an artifact" in complaint(tmp_path)
    (tmp_path / MANIFEST).write_text('{"name": "a web page"}')
    assert "format" in complaint(tmp_path) and not is_artifact(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "ir/../../secret", "C:\\secret", "link"])
def test_files_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"")
    (folder / "link").symlink_to(folder.parent / "secret")
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit(folder, files={**files, name: {"size_bytes": 0, "sha256": "0"}})
    assert "leaves the folder" in complaint(folder)


def test_a_library_that_was_not_checked_is_not_loaded(folder: Path) -> None:
    edit(folder, library="other.so")
    assert "other.so is not among the files" in complaint(folder)


def test_links_are_not_sealed(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").symlink_to("/dev/null")
    with pytest.raises(CompileError, match="link"):
        seal(tmp_path, PLAIN)


def test_a_failed_compile_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staging(tmp_path / "deep" / "out") as work:
        (work / "model.onnx").write_bytes(b"half")
        raise ZeroDivisionError
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two steps"])
def test_an_artifact_is_replaced(folder: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(staging_module, "_exchange", lambda one, other: False)
    with staging(folder) as work:
        fill(work, replace(PLAIN, budgets=("2",)))
    assert open_artifact(folder).manifest.budgets == ("2",)
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_a_failed_recompile_leaves_the_old_artifact(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), staging(folder) as work:
        fill(work, replace(PLAIN, budgets=("2",)))
        raise ZeroDivisionError
    assert open_artifact(folder).manifest.budgets == ("3",)


def test_a_link_to_an_artifact_stays_a_link(folder: Path) -> None:
    link = folder.with_name("latest")
    link.symlink_to(folder)
    with staging(link) as work:
        fill(work, replace(PLAIN, budgets=("2",)))
    assert link.is_symlink() and open_artifact(folder).manifest.budgets == ("2",)


def test_overwriting_can_be_forbidden(folder: Path) -> None:
    with pytest.raises(CompileError, match="there already"):
        check_writable(folder, overwrite=False)


def test_what_is_no_artifact_stays(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    check_writable(home)
    (home / "thesis.txt").write_text("years of work")
    for place in (home, home / "thesis.txt"):
        with pytest.raises(CompileError, match="not an artifact"), staging(place):
            raise AssertionError("no work before the check")
    assert (home / "thesis.txt").read_text() == "years of work"


def test_a_folder_that_others_fill_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CompileError, match="not an artifact"), staging(out) as work:
        fill(work)
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_a_place_that_can_not_be_written_is_known_before_any_work() -> None:
    # root may write anywhere but here
    with pytest.raises(CompileError, match="nothing can be written"):
        check_writable(Path("/proc/gammac/out"))


def test_what_a_killed_compile_left_is_swept_up(tmp_path: Path) -> None:
    for name in (".out.999999999.ab12", ".out.1.ab12", ".out.mine", ".other.999999999.ab12"):
        (tmp_path / name).mkdir()
    with staging(tmp_path / "out") as folder:
        fill(folder)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", ".out.1.ab12", ".out.mine", ".other.999999999.ab12"}
