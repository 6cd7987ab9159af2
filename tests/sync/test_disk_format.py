"""What lies in a store of versions: records that are cut short, altered, forged or hostile are never believed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tests.sync.parts import PROPERTY, bits, make_model

from weightcast.sync import Region, TensorSpec, Version
from weightcast.sync.disk import naming
from weightcast.sync.disk.manifest_checks import ModelLimits, check_manifest
from weightcast.sync.disk.records import (
    Base,
    Begin,
    Hashing,
    Joining,
    Part,
    Shares,
    StoredFile,
    StoredPiece,
    Unfinished,
    VersionManifest,
    seal,
    unseal,
)
from weightcast.sync.disk.tensor_files import Entry, group_by_bytes, lay_out_file
from weightcast.sync.errors import ConfigError, WireError

VERSION = Version(1764150000000, 7)
BEFORE = Version(1764150000000, 6)
KEY = bytes(range(32))
SPECS = (TensorSpec("a.weight", torch.bfloat16, (4, 6)), TensorSpec("b", torch.float32, ()))
FILES = (StoredFile("model-r00000-00000.safetensors", 300, b"\1" * 16), StoredFile("delta-1.st", 100, b"\2" * 16))
DENSE = (
    StoredPiece(0, (0, 0), (4, 3), "dense", 0, 100, 24),
    StoredPiece(0, (0, 3), (4, 3), "dense", 0, 124, 24),
    StoredPiece(1, (), (), "dense", 0, 148, 4),
)
DELTA = (StoredPiece(0, (1, 0), (2, 6), "delta", 1, 40, 30), StoredPiece(1, (), (), "zdelta", 1, 70, 30))
BASE = Base(BEFORE, b"\3" * 16)
LIMITS = ModelLimits(1 << 20, 100)
MANIFEST = VersionManifest(1, "xxh3_128", VERSION, True, BASE, 1.5, SPECS, bytes(16), FILES, dense=DENSE, delta=DELTA)
RECORDS: list[Any] = [
    MANIFEST,
    Part(VERSION, 3, True, bytes(24), FILES, DENSE, DELTA, 0.25, 0.5, 12),
    Begin(VERSION, False, BEFORE),
    Joining(1, "0123456789abcdef", 2, "model", (Region("a.weight", (0, 0), (4, 3)),)),
    Shares(("aa", "bb"), ((Region("a.weight", (0, 0), (4, 6)),), (Region("b", (), ()),))),
]


@pytest.mark.parametrize("rec", RECORDS, ids=lambda rec: type(rec).__name__)
@pytest.mark.parametrize("key", [None, KEY])
def test_a_record_comes_back_and_is_unfinished_at_every_cut(rec: Any, key: bytes | None) -> None:
    raw = seal(rec, Hashing(key))
    assert unseal(raw, type(rec), Hashing(key)) == rec
    for length in range(len(raw)):
        with pytest.raises(Unfinished):
            unseal(raw[:length], type(rec), Hashing(key))
    with pytest.raises(WireError, match="its body has"):
        unseal(raw + b"x", type(rec), Hashing(key))


@PROPERTY
@given(place=st.integers(0), bit=st.integers(0, 7), keyed=st.booleans())
def test_a_flipped_bit_is_never_believed(place: int, bit: int, keyed: bool) -> None:
    hashing = Hashing(KEY if keyed else None)
    raw = bytearray(seal(MANIFEST, hashing))
    raw[place % len(raw)] ^= 1 << bit
    # A larger length in the seal looks like a file that is still being written, and is no version either.
    with pytest.raises((WireError, Unfinished)):
        unseal(bytes(raw), VersionManifest, hashing)


@PROPERTY
@given(raw=st.binary(max_size=200))
def test_arbitrary_bytes_are_no_record(raw: bytes) -> None:
    with pytest.raises((WireError, Unfinished)):
        unseal(raw, VersionManifest, Hashing())


@pytest.mark.parametrize(
    ("written", "read", "hint"),
    [(None, KEY, "sealed without this key"), (KEY, None, "sealed with a key: give it"), (KEY, KEY[::-1], "altered")],
)
def test_a_record_of_another_key_is_refused(written: bytes | None, read: bytes | None, hint: str) -> None:
    with pytest.raises(WireError, match=hint):
        unseal(seal(MANIFEST, Hashing(written)), VersionManifest, Hashing(read))


def test_a_key_must_have_a_sound_length() -> None:
    with pytest.raises(ConfigError, match=r"16 to 64 bytes, got 3; make one with"):
        Hashing(b"abc")


def test_a_sound_manifest_passes() -> None:
    check_manifest(MANIFEST, VERSION, Hashing(), LIMITS)
    check_manifest(replace(MANIFEST, is_anchor=False, dense=()), VERSION, Hashing(), LIMITS)
    check_manifest(replace(MANIFEST, base=None, delta=()), VERSION, Hashing(), LIMITS)


def piece(**changes: Any) -> StoredPiece:
    return replace(DENSE[0], **changes)


HUGE = TensorSpec("a.weight", torch.bfloat16, (1 << 47, 1 << 47))
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "another version's": ({"version": BEFORE}, "moved into the folder of"),
    "another format": ({"format": 0}, "format 0 .* format 1"),
    "hashes without the key": ({"hashing": "blake2b_keyed"}, "the same key"),
    "a base of another epoch": ({"base": replace(BASE, version=Version(5, 1))}, "cannot be a delta upon"),
    "a base that is newer": ({"base": replace(BASE, version=VERSION)}, "cannot be a delta upon"),
    "neither anchor nor delta": ({"is_anchor": False, "base": None, "dense": (), "delta": ()}, "neither an anchor"),
    "dense without being an anchor": ({"is_anchor": False}, "neither an anchor"),
    "deltas without a base": ({"base": None}, "has deltas and no base"),
    "too many tensors": ({"specs": SPECS * 51, "digests": bytes(16 * 51)}, "lists 102 tensors, at most 100"),
    "a name twice": ({"specs": (SPECS[0], SPECS[0])}, "a tensor name twice"),
    "too few digests": ({"digests": bytes(8)}, "1 digests for 2 tensors"),
    "a huge model": ({"specs": (HUGE, SPECS[1])}, "takes .* bytes, at most 1048576 are allowed"),
    "a file twice": ({"files": (FILES[0], FILES[0])}, "lists a file twice"),
    "a gap": ({"dense": DENSE[1:]}, "a.weight: 12 of 24 elements are held"),
    "an overlap": ({"dense": (piece(shape=(4, 6), num_bytes=48), *DENSE[1:])}, "overlaps"),
    "a piece outside": ({"dense": (piece(offset=(1, 0)), *DENSE[1:])}, r"lies at \(1, 0\)"),
    "a piece of other dimensions": ({"dense": (piece(offset=(0,), shape=(12,)), *DENSE[1:])}, "lies at"),
    "a tensor that is not listed": ({"dense": (piece(tensor=2), *DENSE[1:])}, "names tensor 2"),
    "a file that is not listed": ({"dense": (piece(file=2), *DENSE[1:])}, "file 2, which it does not list"),
    "past the file": ({"dense": (piece(start_byte=290), *DENSE[1:])}, "takes the bytes 290 to 314"),
    "too few bytes": ({"dense": (piece(num_bytes=23), *DENSE[1:])}, "dense piece of 12 elements .* has 23 bytes"),
    "a delta in the anchor": ({"dense": (piece(encoding="delta"), *DENSE[1:])}, "dense part has deltas"),
    "a delta larger than any": (
        {
            "delta": (replace(DELTA[0], num_bytes=9000, start_byte=0),),
            "files": (FILES[0], replace(FILES[1], num_bytes=9000)),
        },
        "delta piece of 12 elements of a.weight has 9000 bytes",
    ),
    "deltas of more than there is": ({"delta": (DELTA[0],) * 3}, "change more elements of a.weight than it has"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused(case: str) -> None:
    changes, message = HOSTILE[case]
    with pytest.raises(WireError, match=message):
        check_manifest(replace(MANIFEST, **changes), VERSION, Hashing(), LIMITS)


BAD_NAMES = ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\0b", "a b", "ä", "x" * 129, "a\\b", "c:d"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_file_name_that_leaves_its_folder_is_refused(name: str) -> None:
    raw = seal(replace(MANIFEST, files=(replace(FILES[0], name=name), FILES[1])), Hashing())
    with pytest.raises(WireError, match="a plain file name was expected"):
        unseal(raw, VersionManifest, Hashing())


@PROPERTY
@given(epoch=st.integers(0, 2**63), number=st.integers(0, 2**63))
def test_folder_names_tell_the_version(epoch: int, number: int) -> None:
    version = Version(epoch, number)
    assert naming.parse_version_folder(naming.version_folder(version)) == version
    assert naming.parse_run_folder(naming.run_folder(epoch)) == epoch


@pytest.mark.parametrize(
    "name",
    ["", "1-2", "run-1", "0000000000001-1", "00000000000001-00000001", "1764150000000-00000001.tmp", "a-b", "٣" * 13],
)
def test_other_names_are_no_versions(name: str) -> None:
    assert naming.parse_version_folder(name) is None and naming.parse_run_folder(name) is None


def test_version_names_sort_as_versions() -> None:
    versions = [Version(1764150000000, n) for n in (0, 9, 10, 11, 99_999_999)] + [Version(1764150000001, 0)]
    names = [naming.version_folder(version) for version in versions]
    assert names == sorted(names)


def test_the_library_reads_files_that_are_laid_out_here(tmp_path: Path) -> None:
    tensors = make_model(3)
    entries = [
        Entry(name, tensor.dtype, tuple(tensor.shape), bits(tensor).numpy().tobytes())
        for name, tensor in tensors.items()
    ]
    laid_out = lay_out_file(entries)
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(laid_out.buffers))
    assert path.stat().st_size == laid_out.num_bytes
    raw = path.read_bytes()
    for entry, start in zip(entries, laid_out.starts, strict=True):
        assert raw[start : start + len(entry.data)] == entry.data
        assert start % entry.dtype.itemsize == 0
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            got = file.get_tensor(name)
            assert got.dtype == tensor.dtype and got.shape == tensor.shape and torch.equal(bits(got), bits(tensor))


@PROPERTY
@given(sizes=st.lists(st.integers(0, 50)), limit=st.integers(1, 60))
def test_groups_keep_the_limit_and_the_order(sizes: list[int], limit: int) -> None:
    groups = list(group_by_bytes(sizes, limit))
    assert [index for group in groups for index in group] == list(range(len(sizes)))
    for group in groups:
        assert len(group) == 1 or sum(sizes[index] for index in group) <= limit
