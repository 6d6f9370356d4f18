"""Compiler caches of a node whose home folder is on a network file system."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repa_scale import caches, ranks
from repa_scale.caches import CACHES, use_local_caches

ROOT = "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw"


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node's mounts: a maker that takes lines for its home folder and its folder for temporary files."""
    home, temporary = tmp_path / "ho me", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()

    def made(home_kind="nfs4", temporary_kind="ext4", options="rw"):
        mounts = tmp_path / "mountinfo"
        lines = [ROOT]
        for number, (place, kind) in enumerate([(home, home_kind), (temporary, temporary_kind)], 23):
            place = str(place).replace(" ", "\\040")
            lines.append(f"{number} 22 0:{number} / {place} {options},relatime shared:{number} - {kind} x rw")
        mounts.write_text("\n".join(lines) + "\n")
        monkeypatch.setattr(caches, "MOUNTS", mounts)
        return {"HOME": str(home), "TMPDIR": str(temporary)}

    yield made
    while caches._locks:
        caches._locks.pop().close()


def set_by(environment):
    before = set(environment)
    folder = use_local_caches(environment)
    return folder, {name: value for name, value in environment.items() if name not in before}


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "lustre", "gpfs", "fuse.sshfs", "cifs"])
def test_caches_leave_a_network_home_for_the_nodes_disk(node, kind, tmp_path):
    folder, found = set_by(node(kind))
    assert folder == tmp_path / "tmp" / f"repa-scale-cache-{os.getuid()}" and folder.stat().st_mode & 0o777 == 0o700
    assert found == {
        name: str(folder / name.lower()) for name in CACHES if name != "TORCHINDUCTOR_CACHE_DIR"
    }  # Inductor's is with the temporary files, on the disk of the node


def test_every_verb_on_ranks_sets_them_before_it_looks_for_a_gpu(node, monkeypatch):
    """The driver reads CUDA_CACHE_PATH when CUDA starts."""
    environment, seen = node(), []
    monkeypatch.setattr(ranks, "pick_device", lambda *_: seen.append("CUDA_CACHE_PATH" in environment))
    ranks.Ranks.from_environment("auto", environment)
    assert seen == [True]


@pytest.mark.parametrize("kind", ["ext4", "fuse.fuse-overlayfs"])
def test_a_local_home_keeps_its_caches(node, kind):
    assert set_by(node(kind)) == (None, {})


def test_what_the_user_set_stays(node):
    environment = node()
    environment |= {"TRITON_CACHE_DIR": "/mine", "TORCH_EXTENSIONS_DIR": "/mine", "CUDA_CACHE_PATH": "/mine"}
    assert set_by(environment) == (None, {})
    environment = {**node(), "TRITON_HOME": environment["TMPDIR"]}
    assert "TRITON_CACHE_DIR" not in set_by(environment)[1]


def test_temporary_files_on_a_network_count_too(node, monkeypatch, tmp_path):
    """Then the caches go to the next place that is local and from which programs can be loaded."""
    places = []
    monkeypatch.setattr(caches, "_own_folder", lambda base: places.append(base) or tmp_path)
    assert set(set_by(node("ext4", "nfs"))[1]) == {"TORCHINDUCTOR_CACHE_DIR"}
    assert set(set_by(node("nfs", "nfs"))[1]) == set(CACHES)
    assert tmp_path / "tmp" not in places
    places.clear()
    set_by(node("nfs", "ext4", "rw,noexec"))
    assert tmp_path / "tmp" not in places


@pytest.mark.parametrize("trap", ["link", "writable"])
def test_a_folder_that_others_could_write_is_not_used(node, trap, tmp_path):
    """Programs are loaded from it."""
    environment = node()
    folder = tmp_path / "tmp" / f"repa-scale-cache-{os.getuid()}"
    if trap == "link":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    assert caches._own_folder(tmp_path / "tmp") is None
    assert not any(str(tmp_path) in value for value in set_by(environment)[1].values())


def test_a_cache_stays_for_the_next_start_and_begins_anew_when_it_is_old(node, tmp_path):
    folder, _ = set_by(node())
    kernel = folder / "triton_cache_dir" / "kernel.so"
    kernel.parent.mkdir()
    kernel.touch()
    os.utime(folder / "begun", (0, 0))
    assert set_by(node())[0] == folder and kernel.exists()  # this process uses it still
    while caches._locks:
        caches._locks.pop().close()
    assert set_by(node())[0] == folder and not kernel.exists() and (folder / "begun").stat().st_mtime > 0
    with (folder / "lock").open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.long  # Inductor's import
def test_triton_and_inductor_read_what_is_set(node):
    """The names that the installed versions know."""
    environment = node("nfs", "nfs")
    environment["TMPDIR"] = environment["HOME"]
    program = (
        "import torch._inductor.runtime.cache_dir_utils as u, triton.knobs as k; print(u.cache_dir(), k.cache.dir)"
    )
    values = {"TORCHINDUCTOR_CACHE_DIR": environment["HOME"], "TRITON_CACHE_DIR": environment["HOME"]}
    if not (done := subprocess.run([sys.executable, "-c", program], env={**os.environ, **values},
                                   capture_output=True, text=True)).stdout:  # fmt: skip
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout.strip() == f"{environment['HOME']} {environment['HOME']}"


def test_mounts_with_names_beyond_ascii(tmp_path, monkeypatch):
    """In UTF-8, in another encoding, and with the bytes that the kernel writes in octal."""
    mounts = tmp_path / "mountinfo"
    lines = ["23 22 0:23 / /home/jürgen\\040k rw - nfs4 x rw".encode(), b"24 22 0:24 / /home/j\xfcrgen rw - nfs4 x rw"]
    mounts.write_bytes(b"\n".join([ROOT.encode(), *lines]) + b"\n")
    monkeypatch.setattr(caches, "MOUNTS", mounts)
    found = caches._mounts()
    for home in (os.fsencode("/home/jürgen k/.triton"), b"/home/j\xfcrgen/.triton"):
        assert caches._mount_of(Path(os.fsdecode(home)), found)[0] == "nfs4"
