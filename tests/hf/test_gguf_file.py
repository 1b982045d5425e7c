"""GGUF files: what is read of them, as their library does, and what is refused."""

import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import write_gguf

import jpeft
from jpeft.hf import Rule, gguf_metadata, gguf_tensors, load_base

W = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
METADATA = [
    ("add_string", "a.word", "Käse 🧀"),
    ("add_bool", "a.flag", True),
    ("add_uint8", "a.u8", 255),
    ("add_int8", "a.i8", -3),
    ("add_uint16", "a.u16", 65535),
    ("add_int16", "a.i16", -300),
    ("add_uint32", "a.u32", 2**32 - 1),
    ("add_int32", "a.i32", -(2**31)),
    ("add_uint64", "a.u64", 2**64 - 1),
    ("add_int64", "a.i64", -(2**63)),
    ("add_float32", "a.f32", 0.1),
    ("add_float64", "a.f64", 0.1),
    ("add_array", "a.words", ["one", "", "drei"]),
    ("add_array", "a.numbers", [1, -2, 3]),
    ("add_array", "a.floats", [0.5, 2.0]),
    ("add_array", "a.flags", [True, False]),
]
# 264 bytes of blocks are followed by these, which mean nothing.
PADDING = 24
RULES = [Rule("w", "w", "in out")]
LIKE = {"w": jax.ShapeDtypeStruct((64, 6), jnp.float32)}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_gguf(path, {"w": W}, types={"w": "Q5_0"}, metadata=METADATA)
    return path


def read(path, **how):
    return load_base(path, LIKE, map=RULES, **how)


def test_metadata_is_what_was_written_as_pythons_own_values(file):
    got = gguf_metadata(file)
    want = {key: value for _, key, value in METADATA}
    want["a.f32"] = float(np.float32(0.1))
    assert {k: got[k] for k in want} == want
    for k, value in want.items():
        assert type(got[k]) is type(value)
    assert got["general.architecture"] == "llama"
    assert got["llama.attention.head_count"] == tiny.H
    assert gguf_tensors(file) == {"w": W.shape}
    fields = gguf.GGUFReader(file).fields.items()
    library = {k: f.contents() for k, f in fields if not k.startswith("GGUF.")}
    assert got == library


@pytest.mark.float16
def test_tensors_are_those_of_the_library(file):
    (tensor,) = gguf.GGUFReader(file).tensors
    want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(read(file)["w"], want.T)


def test_alignment_is_the_files_own(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("v", np.arange(3, dtype=np.float32))
    writer.add_tensor("w", W)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reports = []
    got = read(tmp_path / "a.gguf", report=reports.append)
    np.testing.assert_array_equal(got["w"], W.T)
    assert reports[0].unused == ("v",)


def test_metadata_and_stored_codes_need_no_library(tmp_path, monkeypatch, file):
    write_gguf(tmp_path / "a.gguf", {"w": W})
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert gguf_metadata(file)["a.u8"] == 255
    assert read(tmp_path / "a.gguf", transform="stored")["w"].format == "q4_1"
    for path in (file, tmp_path / "a.gguf"):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jpeft\[hf\]'"):
            read(path)


# --- what is damaged -----------------------------------------------------------------


def test_a_file_that_is_cut_off_anywhere_is_refused(file, tmp_path):
    whole, cut = file.read_bytes()[:-PADDING], tmp_path / "cut.gguf"
    cut.write_bytes(whole)
    read(cut)
    for n in range(0, len(whole), 7):
        cut.write_bytes(whole[:n])
        with pytest.raises(jpeft.CheckpointError, match=r"truncated|no GGUF|damaged"):
            read(cut)
    cut.write_bytes(whole[:-1])
    with pytest.raises(jpeft.CheckpointError, match="truncated: 'w' ends at byte"):
        read(cut)


def test_whatever_a_byte_of_the_head_becomes_it_is_read_or_refused(file, tmp_path):
    whole, other = bytearray(file.read_bytes()), tmp_path / "other.gguf"
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.permutation(len(whole) - 6 * 44)[:150]:
        damaged = whole.copy()
        damaged[at] ^= int(rng.integers(1, 256))
        other.write_bytes(damaged)
        try:
            read(other, report=lambda r: None)
        except jpeft.CheckpointError:
            refused += 1
    assert refused > 15


def replaced(file, there, by):
    data = file.read_bytes()
    assert data.count(there) == 1
    return data.replace(there, by)


u32, u64 = (lambda n: n.to_bytes(4, "little")), (lambda n: n.to_bytes(8, "little"))
word = lambda s: u64(len(s)) + s
DAMAGED = {
    "magic": (lambda f: b"PK\3\4" + f.read_bytes()[4:], "begins with b'PK"),
    "empty": (lambda f: b"", "begins with b''"),
    "version": (lambda f: b"GGUF" + u32(9) + f.read_bytes()[8:], "version 9"),
    "byte order": (
        lambda f: b"GGUF\0\0\0\3" + f.read_bytes()[8:],
        "the other byte order",
    ),
    "no UTF-8": (lambda f: replaced(f, b"drei", b"dr\xff\xff"), "is no UTF-8"),
    "twice": (lambda f: replaced(f, b"a.u32", b"a.i32"), "'a.i32' is there twice"),
    "kind": (
        lambda f: replaced(f, word(b"a.flag") + u32(7), word(b"a.flag") + u32(77)),
        "a value of type 77",
    ),
    "a bomb": (
        lambda f: replaced(f, word(b"one"), u64(2**62) + b"one"),
        "it needs 4611686018427387904 bytes more",
    ),
    "axes": (
        lambda f: replaced(f, word(b"w") + u32(2), word(b"w") + u32(5)),
        "a tensor of 5 axes",
    ),
    "rows": (
        lambda f: replaced(
            f, word(b"w") + u32(2) + u64(64), word(b"w") + u32(2) + u64(63)
        ),
        "rows that are no multiple of Q5_0's blocks of 32",
    ),
    "beyond": (
        lambda f: replaced(f, u64(64) + u64(6), u64(64) + u64(2**57)),
        "beyond any array",
    ),
    "type": (
        lambda f: replaced(f, u64(6) + u32(6), u64(6) + u32(99)),
        "'w' has type 99, which gguf",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_refused_by_what_is_wrong(what, file, tmp_path):
    make, message = DAMAGED[what]
    (tmp_path / "a.gguf").write_bytes(make(file))
    with pytest.raises(jpeft.CheckpointError) as error:
        read(tmp_path / "a.gguf")
    assert message in str(error.value) and "a.gguf: " in str(error.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(jpeft.CheckpointError, match="this is not there"):
        gguf_metadata(tmp_path / "a.gguf")
    with pytest.raises(jpeft.CheckpointError, match="this is a folder"):
        gguf_metadata(tmp_path)


@pytest.mark.float16
def test_a_scale_that_is_not_finite_is_refused_where_codes_are_kept(tmp_path):
    write_gguf(tmp_path / "a.gguf", {"w": W})
    raw = gguf.quants.quantize(W, gguf.GGMLQuantizationType.Q4_1)
    data, first = (tmp_path / "a.gguf").read_bytes(), raw[0].tobytes()
    assert data.count(first) == 1
    infinite = b"\0\x7c" + first[2:]
    (tmp_path / "a.gguf").write_bytes(data.replace(first, infinite))
    with pytest.raises(jpeft.CheckpointError, match="w: 'w' of .*NaN or infinite"):
        read(tmp_path / "a.gguf", transform="stored")
