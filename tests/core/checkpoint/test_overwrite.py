"""What is at the destination: nothing goes but a model that was there, as it was, when the run began."""

from __future__ import annotations

import os
import shutil

import pytest

from fourbit.checkpoint import CheckpointError, destination, staging
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.folders import contents, write_folder


def once(change):
    """As a progress callback: does it at the first tensor."""
    calls = []

    def callback(name, done, total):
        calls.append(name)
        if len(calls) == 1:
            change()

    return callback


def add_file(dst):
    (dst / "letters.txt").write_text("dear")


def add_deep_file(dst):
    (dst / "kept").mkdir()
    (dst / "kept" / "letters.txt").write_text("dear")


def change_file(dst):
    """As long, and with its times."""
    before = (dst / "tokenizer.json").stat()
    (dst / "tokenizer.json").write_text("[]")
    os.utime(dst / "tokenizer.json", ns=(before.st_atime_ns, before.st_mtime_ns))


def remove_file(dst):
    (dst / "tokenizer.json").unlink()


def another_folder(dst):
    shutil.rmtree(dst)
    write_folder(dst)


CHANGES = {
    add_file: "letters.txt is new",
    add_deep_file: "kept/letters.txt is new",
    change_file: "tokenizer.json has changed",
    remove_file: "tokenizer.json is gone",
    another_folder: "it is another folder",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_changes_meanwhile_stays(src, dst, want, change):
    with pytest.raises(CheckpointError, match="is not what it was when the run began") as failed:
        quantize_checkpoint(src, dst, overwrite=True, progress=once(lambda: change(dst)))
    if change is not another_folder:  # whose inode may be the old one's
        assert CHANGES[change] in str(failed.value)
    now = contents(dst)
    with pytest.raises(CheckpointError, match="is not what it was when the run began"):
        quantize_checkpoint(src, dst, resume=True)
    assert contents(dst) == now
    os.rename(dst, dst.with_name("elsewhere"))  # what the message says to do
    report = quantize_checkpoint(src, dst, resume=True)
    assert contents(dst) == want and report.resumed_bytes == report.bytes_before
    assert contents(dst.with_name("elsewhere")) == now and not staging.unfinished_folder(dst).exists()


@pytest.mark.parametrize("options", ({}, {"overwrite": True}, {"resume": True}), ids=str)
def test_what_appears_meanwhile_stays(src, want, tmp_path, options):
    dst = tmp_path / "new"
    with pytest.raises(CheckpointError, match="has appeared meanwhile, and is not replaced"):
        quantize_checkpoint(src, dst, progress=once(lambda: write_folder(dst)), **options)
    assert contents(dst) == contents(src)
    with pytest.raises(CheckpointError, match="exists already .*or move it elsewhere, and --resume continues"):
        quantize_checkpoint(src, dst, resume=True)
    shutil.rmtree(dst)
    report = quantize_checkpoint(src, dst, resume=True)
    assert contents(dst) == want and report.resumed_bytes == report.bytes_before


def test_what_vanishes_meanwhile_is_no_harm(src, dst, want):
    quantize_checkpoint(src, dst, overwrite=True, progress=once(lambda: shutil.rmtree(dst)))
    assert contents(dst) == want


OWN = ("letters.txt", "photos/a.jpg", "backup.bin", "other.safetensors", ".git/HEAD", "run.py", "empty/")


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("ours", (True, False))
def test_files_of_the_user_are_named_and_stay(src, dst, tmp_path, name, ours):
    folder = dst if ours else write_folder(tmp_path / "plain")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("mine")
    before = contents(folder)
    with pytest.raises(CheckpointError, match=f"something else than a model, and is not replaced: {name}. Move it"):
        quantize_checkpoint(src, folder, overwrite=True)
    assert contents(folder) == before and (folder / name).exists()
    assert not staging.unfinished_folder(folder).exists()


@pytest.mark.parametrize("name", ("README.md", "modeling_own.py", "adapter_model.safetensors"))
def test_what_a_folder_of_ours_did_not_have_at_first_is_the_users(src, dst, tmp_path, name):
    """Names of the format are no licence where the manifest says what was written."""
    (dst / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"something else than a model, and is not replaced: {name}. Move it"):
        quantize_checkpoint(src, dst, overwrite=True)
    assert (dst / name).read_text() == "mine"


def test_weights_among_documents(src, tmp_path):
    """One .safetensors file does not make a model of a folder of documents."""
    (folder := tmp_path / "documents").mkdir()
    shutil.copy(src / "model.safetensors", folder)
    for i in range(30):
        (folder / f"{i:02}.txt").write_text("dear")
    with pytest.raises(CheckpointError, match=r"not replaced: 00.txt, 01.txt, .*09.txt and 20 more"):
        quantize_checkpoint(src, folder, overwrite=True)
    assert len(list(folder.iterdir())) == 31


def test_a_collection_of_weights_is_no_model(src, tmp_path):
    (folder := tmp_path / "loras").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(src / "model.safetensors", folder / name)
    with pytest.raises(CheckpointError, match=r"not replaced: a.safetensors, b.safetensors\."):
        quantize_checkpoint(src, folder, overwrite=True)


def test_models_are_replaced(src, want, tmp_path):
    """Other libraries' model folders, an empty folder, and a folder of ours that is damaged."""
    plain = write_folder(tmp_path / "plain", shards=3)
    for name in ("README.md", "generation_config.json", "vocab.txt", "modeling_own.py", ".gitattributes", "LICENSE"):
        (plain / name).write_text("")
    (plain / ".cache" / "huggingface").mkdir(parents=True)
    (plain / ".cache" / "huggingface" / "CACHEDIR.TAG").write_text("")
    (empty := tmp_path / "empty").mkdir()
    quantize_checkpoint(src, damaged := tmp_path / "damaged")
    (damaged / "model.safetensors").unlink()
    (src / "own.dat").write_text("carried over, so the manifest knows it")
    quantize_checkpoint(src, carried := tmp_path / "carried")
    (src / "own.dat").unlink()
    for folder in (plain, empty, damaged, carried):
        assert quantize_checkpoint(src, folder, overwrite=True).leftovers == ()
        assert contents(folder) == want
        assert verify_checkpoint(folder).ok and not staging.unfinished_folder(folder).exists()


def link_file(src, dst):
    (src / "model.safetensors").unlink()
    (src / "model.safetensors").symlink_to("../dst/model.safetensors")


def link_other_file(src, dst):
    (src / "tokenizer.json").unlink()
    (src / "tokenizer.json").symlink_to(dst / "tokenizer.json")


def link_inner_folder(src, dst):
    (src / "docs").symlink_to(dst)


def link_folder(src, dst):
    shutil.rmtree(src)
    src.symlink_to(dst)


def link_to_link(src, dst):
    link_file(src, dst)
    os.rename(src / "model.safetensors", src.parent / "between")
    (src.parent / "between").unlink()
    (src.parent / "between").symlink_to(dst / "model.safetensors")
    (src / "model.safetensors").symlink_to("../between")


LINKS = (link_file, link_other_file, link_inner_folder, link_folder, link_to_link)


@pytest.mark.parametrize("link", LINKS, ids=lambda f: f.__name__)
def test_source_of_links_into_the_destination(tmp_path, link):
    src, dst = write_folder(tmp_path / "src"), write_folder(tmp_path / "dst")
    link(src, dst)
    before = contents(dst)
    refusals = "Choose another destination|is the source, or a folder around it|outside of its folder"
    with pytest.raises(CheckpointError, match=refusals):
        quantize_checkpoint(src, dst, overwrite=True)
    assert contents(dst) == before and not staging.unfinished_folder(dst).exists()


def test_a_named_file_that_is_a_link_into_the_destination(tmp_path):
    src, dst = write_folder(tmp_path / "src"), write_folder(tmp_path / "dst")
    link_file(src, dst)
    before = contents(dst)
    with pytest.raises(CheckpointError, match="Choose another destination"):
        quantize_checkpoint(src / "model.safetensors", dst, overwrite=True)
    assert contents(dst) == before and not staging.unfinished_folder(dst).exists()


def test_source_of_hard_links_of_the_destination(tmp_path, want):
    dst = write_folder(tmp_path / "dst")
    (src := tmp_path / "linked").mkdir()
    for path in dst.iterdir():
        os.link(path, src / path.name)
    before = contents(src)
    quantize_checkpoint(src, dst, overwrite=True)
    assert contents(src) == before and (dst / "model.safetensors").read_bytes() == want["model.safetensors"]


def test_leftovers_of_earlier_versions_are_named(src, tmp_path):
    (old := tmp_path / ".dst.0123abcd.replaced").mkdir()
    assert quantize_checkpoint(src, tmp_path / "dst").leftovers == (old,)
    assert quantize_checkpoint(src, tmp_path / "dst", resume=True).leftovers == (old,)
    assert old.is_dir()


def file_of_that_name(left):
    left.write_text("mine")


def link_of_that_name(left):
    (left.parent / "mine").mkdir()
    (left.parent / "mine" / "data").mkdir()
    (left.parent / "mine" / "lock").write_text("")
    left.symlink_to("mine")


def folder_of_that_name(left):
    (left / "data").mkdir(parents=True)
    (left / "data" / "letters.txt").write_text("dear")


@pytest.mark.parametrize("make", (file_of_that_name, link_of_that_name, folder_of_that_name), ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", ({}, {"resume": True}, {"overwrite": True}), ids=str)
def test_an_unfinished_folder_of_somebody_else(src, tmp_path, make, options):
    left = destination.unfinished_folder(tmp_path / "dst")
    make(left)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="needs this name. Move it elsewhere"):
        quantize_checkpoint(src, tmp_path / "dst", **options)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
