"""safetensors files are read as strictly as the reference library reads them."""

import json
import os
import re
import struct
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jpeft
from jpeft.checkpoint._safetensors import DTYPES, LARGEST_HEADER, open_tensors
from jpeft.checkpoint.stream import load_quantized

A = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
B = '{"dtype":"F32","shape":[2],"data_offsets":[8,16]}'


def info(dtype="F32", shape="[2]", offsets="[0,8]", more=""):
    fields = f'"dtype":{json.dumps(dtype)},"shape":{shape},"data_offsets":{offsets}'
    return "{" + fields + more + "}"


def beside(first, b=B):
    return f'{{"a":{first},"b":{b}}}'


def nested(n):
    return "[" * n + "]" * n


# What the reference library says of each is asked of it when the test runs.
HEADERS = {
    "as it should be": beside(A),
    "padded": beside(A) + "   \n",
    "led by blanks": "  " + beside(A),
    "metadata": f'{{"__metadata__":{{"x":"1"}},"a":{A},"b":{B}}}',
    "no metadata": f'{{"__metadata__":null,"a":{A},"b":{B}}}',
    "an empty name": f'{{"":{A},"b":{B}}}',
    "a character in two halves": f'{{"\\ud83d\\ude00":{A},"b":{B}}}',
    "a field more": beside(info(more=',"x":1')),
    "125 lists in a field more": beside(info(more=f',"x":{nested(125)}')),
    "nothing in between": f'{{"z":{info("F32", "[0]", "[8,8]")},"a":{A},"b":{B}}}',
    "nothing at the end": f'{{"z":{info("U8", "[3,0]", "[16,16]")},"a":{A},"b":{B}}}',
    "a scalar": beside(info("F64", "[]")),
    "bits and exponents": beside(info("F8_E8M0", "[8]")),
    "complex": beside(info("C64", "[1]")),
    "another order": f'{{"b":{B},"a":{A}}}',
    # From here on it refuses.
    "half a character": f'{{"\\ud800":{A},"b":{B}}}',
    "half a character in a field": beside(info(more=',"x":"\\ud800"')),
    "126 lists in a field more": beside(info(more=f',"x":{nested(126)}')),
    "100 000 lists": nested(100_000),
    "a list": "[]",
    "nothing": "",
    "null": "null",
    "a hole": beside(info(offsets="[4,12]"), info(offsets="[12,20]")),
    "a hole before": beside(info(offsets="[1,9]"), info("U8", "[7]", "[9,16]")),
    "an overlap": beside(A, info(offsets="[4,12]")),
    "one in the other": beside(A, info("U8", "[4]", "[2,6]")),
    "the same twice": beside(A, A),
    "the end before the start": beside(info(offsets="[8,0]")),
    "below the start": beside(info(offsets="[-8,0]")),
    "bytes too many": beside(info(shape="[1]")),
    "nothing, elsewhere": f'{{"z":{info("F32", "[0]", "[4,4]")},"a":{A},"b":{B}}}',
    "no end": beside('{"dtype":"F32","shape":[2]}'),
    "three offsets": beside(info(offsets="[0,8,8]")),
    "offsets that are floats": beside(info(offsets="[0.0,8]")),
    "shapes that are floats": beside(info(shape="[2.0]")),
    "shapes with exponents": beside(info(shape="[2e0]")),
    "shapes of truths": beside(info(shape="[true,2]")),
    "shapes of words": beside(info(shape='["2"]')),
    "no shape": beside(info(shape="null")),
    "minus nothing": beside(info(offsets="[-0,8]")),
    "a leading zero": beside(info(shape="[02]")),
    "more than 64 bits": f'{{"z":{info("F32", f"[0,{2**64}]", "[0,0]")},"b":{A}}}',
    "overflow": f'{{"z":{info("F32", f"[{2**63},4,0]", "[0,0]")},"a":{A},"b":{B}}}',
    "a dtype of none": beside(info("F33")),
    "a dtype that is a number": beside(info(4)),
    "a field twice": beside(info(more=',"shape":[2]')),
    "metadata of numbers": f'{{"__metadata__":{{"x":1}},"a":{A},"b":{B}}}',
    "metadata of lists": f'{{"__metadata__":[],"a":{A},"b":{B}}}',
    "metadata twice": f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{A},"b":{B}}}',
    "a tensor that is null": f'{{"a":null,"b":{B}}}',
    "NaN": beside(info(more=',"x":NaN')),
    "Infinity": beside(info(more=',"x":-Infinity')),
    "1e999": beside(info(more=',"x":1e999')),
    "9000 digits": beside(info(more=f',"x":{"9" * 9000}')),
    "a tab in a name": f'{{"a\t":{A},"b":{B}}}',
    "a comma too many": f'{{"a":{A},"b":{B},}}',
    "a byte order mark": "\ufeff" + beside(A),
    "UTF-16": beside(A).encode("utf-16"),
    "UTF-32": beside(A).encode("utf-32"),
    "Latin-1": f'{{"\u00e4":{A},"b":{B}}}'.encode("latin-1"),
    "a zero byte behind": beside(A) + "\0",
}
# What it takes and we do not: nobody writes the first ones, NumPy has not the others.
STRICTER = {
    "a name twice": f'{{"a":{A},"a":{A},"b":{B}}}',
    "a name twice in the metadata": f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{A},'
    f'"b":{B}}}',
    "a list of fields": beside('["F32",[2],[0,8]]'),
    "four bits": f'{{"a":{info("F4", "[32]", "[0,16]")}}}',
    "nothing of 2**63": f'{{"z":{info("U8", f"[0,{2**63}]", "[0,0]")},"a":{A},'
    f'"b":{B}}}',
}


def as_file(header, data=bytes(range(16)), length=None):
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def by_the_library(data):
    """{name: (dtype, shape, bytes)}, or None where it refuses."""
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {n: (x["dtype"], tuple(x["shape"]), bytes(x["data"])) for n, x in found}


def by_us(file, data):
    """The same; any other exception than ours, or one without the file, is raised."""
    file.write_bytes(data)
    try:
        tensors = open_tensors(file)
        arrays = {n: tensors.read(n) for n in tensors.stored}
    except jpeft.CheckpointError as error:
        assert str(file) in str(error), error
        assert len(str(error)) < 1000
        return None, str(error)
    names = {np.dtype(x): n for n, x in DTYPES.items()}
    return {n: (names[x.dtype], x.shape, x.tobytes()) for n, x in arrays.items()}, ""


@pytest.mark.parametrize("name", HEADERS)
def test_the_verdict_is_that_of_the_library(tmp_path, name):
    data = as_file(HEADERS[name])
    found, why = by_us(tmp_path / "a.safetensors", data)
    assert found == by_the_library(data), why


@pytest.mark.parametrize("name", STRICTER)
def test_what_no_one_writes_is_refused(tmp_path, name):
    data = as_file(STRICTER[name])
    assert by_the_library(data) is not None
    assert by_us(tmp_path / "a.safetensors", data)[0] is None


SIZES = {
    "bytes behind": (as_file(beside(A)) + b"x", "'b' ends at byte .* the file at"),
    "a byte short": (as_file(beside(A))[:-1], "truncated: 'b' ends at byte"),
    "no header": (as_file("{}", b""), None),
    "bytes of no tensor": (as_file("{}"), "the header ends at byte 10, the file at 26"),
    "seven bytes": (b"1234567", "truncated, or no safetensors"),
    "a length beyond the file": (as_file(beside(A), length=999), "truncated, or no"),
    "the largest length": (as_file(beside(A), length=2**64 - 1), "truncated, or no"),
}


@pytest.mark.parametrize("name", SIZES)
def test_no_byte_is_left_over_and_none_is_missing(tmp_path, name):
    data, told = SIZES[name]
    found, why = by_us(tmp_path / "a.safetensors", data)
    assert found == by_the_library(data)
    assert (told is None) == (found is not None)
    assert told is None or re.search(told, why), why


def test_a_header_is_measured_before_it_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    with file.open("wb") as f:
        f.write(struct.pack("<Q", 10 * 2**30))
        f.truncate(11 * 2**30)  # takes no room on the disk
    with pytest.raises(jpeft.CheckpointError, match=f"allows {LARGEST_HEADER}"):
        open_tensors(file)
    index = tmp_path / "a.safetensors.index.json"
    with index.open("wb") as f:
        f.truncate(11 * 2**30)
    with pytest.raises(jpeft.CheckpointError, match="too large for an index"):
        open_tensors(index)


# --- headers changed at random -------------------------------------------------------


def written(draw):
    """A file of the library's, small, of several dtypes."""
    kinds = [np.float32, np.float16, np.int8, np.uint8, np.int64, np.bool_, np.float64]
    tensors = {
        f"layers.{k}.{n}": np.ones(tuple(draw.integers(0, 4, size=draw.integers(3))), t)
        for k, (n, t) in enumerate(zip("abcd", draw.permutation(kinds), strict=False))
    }
    return safetensors.numpy.save(tensors, metadata={"format": "pt"})


NUMBER = re.compile(rb"\d+")
TOKENS = [b"null", b"true", b"-1", b"1.0", b"0", b"[]", b"{}", b'"F32"', b"1e3", b'"a"']


def changed(data, draw):
    """The file with one thing changed, of its header mostly."""
    (length,) = struct.unpack("<Q", data[:8])
    head, rest = bytearray(data[8 : 8 + length]), data[8 + length :]
    kind = int(draw.integers(8))
    k = int(draw.integers(length))
    if kind == 0:
        head[k] ^= 1 << int(draw.integers(8))
    elif kind == 1:
        del head[k : k + int(draw.integers(1, 9))]
    elif kind == 2:
        head[k:k] = draw.choice(TOKENS)
    elif kind in (3, 4):  # another number, near or far
        numbers = list(NUMBER.finditer(head))
        at = numbers[int(draw.integers(len(numbers)))]
        other = int(at[0]) + int(draw.choice([-1, 1, 4, 8, -8, 2**31, 2**62]))
        head[at.start() : at.end()] = str(other).encode()
    elif kind == 5:  # one of its parts in the place of another
        words = list(re.finditer(rb'"[^"]*"|\[[\d,]*\]', head))
        a, b = (words[int(draw.integers(len(words)))] for _ in range(2))
        head[a.start() : a.end()] = b[0]
    elif kind == 6:  # an entry twice
        entries = re.findall(rb'"[^"]*":\{[^{}]*\}', head)
        head[1:1] = entries[int(draw.integers(len(entries)))] + b","
    else:
        cut = int(draw.integers(-3, 4))
        rest = rest[:cut] if cut < 0 else rest + bytes(cut)
    n = len(head) + (int(draw.integers(-2, 3)) if kind == 0 and k % 5 == 0 else 0)
    return struct.pack("<Q", max(n, 0)) + bytes(head) + rest


@pytest.mark.parametrize("n", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_headers_changed_at_random_are_judged_as_the_library_does(tmp_path, n):
    """None is taken that it refuses, none read as other arrays; ours is stricter in
    three things only, each said in the message."""
    draw, found = np.random.default_rng(0), Counter()
    for _ in range(n):
        data = changed(written(draw), draw)
        ours, why = by_us(tmp_path / "a.safetensors", data)
        theirs = by_the_library(data)
        if ours is None and theirs is not None:
            told = ("is there twice", "has dtype F", "beyond any")
            assert any(x in why for x in told), why
            found["stricter"] += 1
            continue
        assert ours == theirs, why
        found["refused" if ours is None else "accepted"] += 1
    print(dict(found))
    assert found["refused"] > n // 2 and found["accepted"] > n // 50


# --- files that are none, and indexes ------------------------------------------------


def refused(told, path):
    like = {"w": jax.ShapeDtypeStruct((64, 2), jnp.float32)}
    with pytest.raises(jpeft.CheckpointError) as error:
        load_quantized(path, jpeft.quantize("nf4", where="w"), like)
    for part in [str(path), told]:
        assert part in str(error.value), str(error.value)


def loop(path):
    path.symlink_to(path)


NONE = {
    "a folder": (lambda p: p.mkdir(), "this is a folder", "there is nothing"),
    "a pipe": (os.mkfifo, "this is no regular file", "this is neither file nor folder"),
    "a loop": (loop, "cannot be read", "no such file or folder"),
    "a link to nothing": (
        lambda p: p.symlink_to(p.with_name("b")),
        "cannot be read: No such file",
        "no such file or folder",
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, name):
    make, within, alone = NONE[name]
    file = tmp_path / "a.safetensors"
    make(file)
    refused(within, tmp_path)
    refused(alone, file)
    make(tmp_path / "a.safetensors.index.json")
    if name != "a folder":
        (tmp_path / "a.safetensors").unlink()
    refused("a.safetensors.index.json: ", tmp_path)


INDEXES = {
    "a list": ("[]", 'expected {"weight_map": {tensor: file}}, found []'),
    "a number": ('{"weight_map": {"w": 3}}', "expected {"),
    "two kinds": ('{"weight_map": {"w": 3, "v": "a"}}', "expected {"),
    "nested": (f'{{"weight_map": {nested(100_000)}}}', "nested too deeply"),
    "twice": ('{"weight_map": {"w": "a", "w": "b"}}', "'w' is there twice"),
    "UTF-16": ('{"weight_map": {}}'.encode("utf-16"), "damaged"),
    "outside": ('{"weight_map": {"w": "../b.safetensors"}}', "outside its own folder"),
    "further outside": ('{"weight_map": {"w": "x/../../b"}}', "outside its own folder"),
    "absolute": ('{"weight_map": {"w": "/b.safetensors"}}', "outside its own folder"),
    "of Windows": ('{"weight_map": {"w": "..\\\\b"}}', "outside its own folder"),
    "a drive": ('{"weight_map": {"w": "C:b"}}', "outside its own folder"),
    "a name too long": (f'{{"weight_map": {{"w": "{"x" * 999}"}}}}', "are missing"),
    "a zero byte": ('{"weight_map": {"w": "a\\u0000b"}}', "outside its own folder"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_is_read_as_strictly(tmp_path, name):
    text, told = INDEXES[name]
    w = np.ones((64, 2), np.float32)
    folder = tmp_path / "in"
    folder.mkdir()
    for place in (tmp_path, folder):
        safetensors.numpy.save_file({"w": w}, place / "b.safetensors")
    data = text if isinstance(text, bytes) else text.encode()
    index = folder / "model.safetensors.index.json"
    index.write_bytes(data)
    refused(told, folder)
    # The remedy.
    index.write_text('{"weight_map": {"w": "b.safetensors"}}')
    like = {"w": jax.ShapeDtypeStruct((64, 2), jnp.float32)}
    load_quantized(folder, jpeft.quantize("nf4", where="w"), like)


def test_shards_may_be_links(tmp_path):
    """As the cache of a hub keeps them."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), folder.mkdir()
    w = np.ones((64, 2), np.float32)
    safetensors.numpy.save_file({"w": w}, blobs / "0f3e")
    (folder / "model.safetensors").symlink_to("../blobs/0f3e")
    like = {"w": jax.ShapeDtypeStruct((64, 2), jnp.float32)}
    load_quantized(folder, jpeft.quantize("nf4", where="w"), like)


def test_a_file_that_shrinks_after_it_was_opened_is_named(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(as_file(beside(A)))
    tensors = open_tensors(file)
    file.write_bytes(b"")
    with pytest.raises(jpeft.CheckpointError, match="a.safetensors: 'a' is not there"):
        tensors.read("a")


def test_two_spellings_of_one_name_are_told_apart(tmp_path):
    both = {
        "d.kernel": np.ones((64, 2), np.float32),
        "d/kernel": np.full((64, 2), 2, np.float32),
    }
    safetensors.numpy.save_file(both, tmp_path / "a.safetensors")
    like = {"d": {"kernel": jax.ShapeDtypeStruct((64, 2), jnp.float32)}}
    model = tmp_path, jpeft.quantize("nf4"), like
    with pytest.raises(jpeft.CheckpointError) as error:
        load_quantized(*model)
    told = str(error.value)
    assert "d/kernel: " in told and "has 'd/kernel' and 'd.kernel'" in told
    advice = eval(told.partition("names=")[2])
    for names, value in ((advice, 2), ({"d/kernel": "d.kernel"}, 1)):
        loaded = jpeft.merge(load_quantized(*model, names=names))
        assert (loaded["d"]["kernel"] == value).all()
