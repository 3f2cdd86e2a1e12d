"""Realistic faults in what keeps folders whole, and the test that has to find each, by what it is about."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

from fourbit.checkpoint import destination, disk, output, reader, snapshot, staging, streaming, untrusted, verify
from fourbit.checkpoint.pipeline import Pipeline

NEW = "crash/test_power_cut.py::test_a_new_folder"
RESUMED = "crash/test_power_cut.py::test_an_interrupted_run_keeps_what_it_noted"
OVERWRITE = "checkpoint/test_overwrite.py::"
RENAMES = "checkpoint/test_renames.py::"
BELIEVED = "checkpoint/test_believed.py::"
FORMS = "checkpoint/test_forms.py::"

Fault = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[Fault, tuple[str, str]] = {}
"""Each fault, the test that finds it, and what that says."""


def found_by(test: str, says: str) -> Callable[[Fault], Fault]:
    def add(fault: Fault) -> Fault:
        FAULTS[fault] = test, says
        return fault

    return add


class WithoutFsync:
    """The module `os` less fsync; the rest as it is at the moment, so that a watch on it sees it."""

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, descriptor):
        pass


def flush_only(stream):
    stream.flush()


@found_by(NEW, "a folder that is not whole has the destination's name")
def no_fsync(patch):
    """Nothing is flushed to the disk, no file and no folder."""
    patch.setattr(disk, "os", WithoutFsync())


@found_by(NEW, "what was said to be done is lost")
def no_folder_sync(patch):
    """Files are flushed and names are not."""
    patch.setattr(disk, "sync_folder", lambda folder: None)


@found_by(NEW, "a folder that is not whole has the destination's name")
def no_subfolder_sync(patch):
    """Only the names in the new folder itself are flushed."""
    patch.setattr(disk, "sync_tree", disk.sync_folder)


@found_by(NEW, "what was said to be done is lost")
def destination_not_synced(patch):
    """The last rename may not be on the disk when the run says that it is done."""
    real = disk.sync_folder
    patch.setattr(disk, "sync_folder", lambda folder: real(folder) if ".dst" in str(folder) else None)


@found_by(NEW, "a folder that is not whole has the destination's name")
def weights_not_flushed(patch):
    """Weight files get their names, and a line in the journal, before they are on the disk."""
    patch.setattr(output, "flush_to_disk", flush_only)


@found_by(NEW, "a folder that is not whole has the destination's name")
def other_files_not_flushed(patch):
    """config.json, the manifest and what is carried over get their names before they are on the disk."""
    patch.setattr(disk, "flush_to_disk", flush_only)


@found_by(RESUMED, "what was noted is lost")
def weight_file_without_a_name(patch):
    """The journal notes tensors in a file whose name is not on the disk."""
    real = disk.sync_folder
    patch.setattr(disk, "sync_folder", lambda folder: None if folder.name == "data" else real(folder))


@found_by(RENAMES + "test_failed_rename_is_rolled_back", "assert {} == {")
def no_roll_back(patch):
    """After a failed rename the old folder stays under another name."""
    patch.setattr(staging.Stage, "_put_back", lambda self: None)


@found_by(RENAMES + "test_killed_between_the_renames", "assert {} == {")
def not_tidied(patch):
    """What a kill left between the renames is not looked for."""
    patch.setattr(staging, "tidy", lambda dst: None)


@found_by(OVERWRITE + "test_what_changes_meanwhile_stays[add_file]", "DID NOT RAISE")
def destination_checked_at_the_start_only(patch):
    """What has changed in the destination since is not looked at."""
    patch.setattr(snapshot, "differences", lambda old, folder: [])


@found_by(RENAMES + "test_what_is_added_at_the_last_moment_is_kept_and_named", "assert () == (")
def all_is_removed(patch):
    """The replaced folder is removed whatever is in it by then."""
    patch.setattr(snapshot, "remove", lambda old, folder: not shutil.rmtree(folder))


@found_by(OVERWRITE + "test_what_appears_meanwhile_stays[{'overwrite': True}]", "DID NOT RAISE")
def what_appears_is_replaced(patch):
    """--overwrite replaces what was not there when the run began."""

    def set_aside(self, replaces):
        os.rename(self.dst, self.replaced)

    patch.setattr(staging.Stage, "_set_aside", set_aside)


@found_by(OVERWRITE + "test_files_of_the_user_are_named_and_stay[True-letters.txt]", "DID NOT RAISE")
def any_folder_is_a_model(patch):
    """A user's files in a model folder are removed with it."""
    patch.setattr(destination, "_strangers", lambda dst, found: [])


@found_by(OVERWRITE + "test_a_named_file_that_is_a_link_into_the_destination", "DID NOT RAISE")
def links_are_not_followed(patch):
    """Where the source's files really are is not looked at."""
    patch.setattr(destination, "_places", lambda file: tuple(file.absolute().parents))


@found_by(BELIEVED + "test_read_back", "DID NOT RAISE")
def no_read_back(patch):
    """What was written is not read again before it gets its name."""
    patch.setattr(verify, "against_manifest", lambda *_: iter(()))


@found_by(BELIEVED + "test_finished_and_damaged_since[1-flip_bit]", "DID NOT RAISE")
def manifest_is_trusted(patch):
    """--resume on a finished folder reads the manifest and nothing else."""
    patch.setattr(verify, "verify_checkpoint", lambda path: verify.Verification(path, True, True, 0, 0, 0, ()))


@found_by(BELIEVED + "test_source_rewritten_between_runs", "DID NOT RAISE")
def size_and_time_are_trusted(patch):
    """A source of the same size and time is taken for the same."""
    patch.setattr(streaming, "compare", lambda job, hashes: None)


@found_by("checkpoint/test_names.py::test_names_that_were_once_temporary", "config.json.tmp")
def temporary_names_collide(patch):
    """A temporary file has a name that the source may have."""
    for module in (disk, output):
        patch.setattr(module, "temporary", lambda path: path.with_name(path.name + ".tmp"))


@found_by("checkpoint/test_verify.py::test_planted_files_that_a_loader_reads_are_faults[modeling_own.py]", "0 == 1")
def only_what_is_listed_is_verified(patch):
    """A folder with other files than the manifest's passes for what was written."""
    patch.setattr(verify, "unknown_files", lambda *_: ([], []))


@found_by("checkpoint/test_pipeline.py::test_bytes_in_memory_are_bounded", "20 == 3")
def no_memory_bound(patch):
    """Reading runs ahead of writing as far as it can."""
    patch.setattr(Pipeline, "_admit", lambda self, nbytes: True)


@found_by(FORMS + "test_a_name_twice_in_a_header", "DID NOT RAISE")
def names_twice_in_a_header(patch):
    """Of two tensors of one name in a header the last one counts."""
    patch.setattr(untrusted, "unique_names", dict)


@found_by(FORMS + "test_a_name_in_two_shards", "DID NOT RAISE")
def names_in_two_shards(patch):
    """Of two tensors of one name in two shards the last one counts."""
    patch.setattr(reader, "_by_name", lambda path, found: {info.name: info for info in found})
