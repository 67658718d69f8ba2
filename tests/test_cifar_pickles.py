"""CIFAR's pickles: what they hold is read, what a pickle may ask for beyond that is refused and not done."""

import copyreg
import importlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcl.data import load_cifar10, load_cifar100
from fastcl.data._cifar import GLOBALS, read_pickle

PIXELS = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)


def python2_file(pixels=PIXELS, labels=(6, 9), code=b"u1") -> bytes:
    """A batch as Python 2's cPickle wrote it: protocol 2, byte strings throughout."""
    short = lambda s: b"U" + bytes([len(s)]) + s  # noqa: E731
    shape = b"".join(b"J" + struct.pack("<i", n) for n in pixels.shape)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\x09U\x01bq\x0a\x87q\x0bRq\x0c"
        + (b"(K\x01" + shape + b"\x86q\x0dcnumpy\ndtype\nq\x0e" + short(code) + b"q\x0fK\x00K\x01\x87q\x10Rq\x11")
        + (b"(K\x03U\x01|q\x12NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x13b\x89T" + struct.pack("<i", pixels.size) + pixels.tobytes())
        + b"q\x14tq\x15b"
    )
    numbers = b"]q\x05(" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    text = short(b"batch_label") + b"q\x02" + short(b"training batch 1 of 5 \xe9") + b"q\x03"
    files = short(b"filenames") + b"q\x16]q\x17(" + short(b"leptodactylus_pentadactylus_s_000004.png") + short(b"b.png") + b"e"
    return b"\x80\x02}q\x01(" + text + short(b"labels") + b"q\x04" + numbers + short(b"data") + b"q\x06" + array + files + b"u."


def read(tmp_path, content: bytes):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    return read_pickle(path)


def test_the_format_of_the_real_files(tmp_path):
    content = python2_file()
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], PIXELS), "the file written here is what NumPy reads"
    found = read(tmp_path, content)
    assert sorted(found) == [b"batch_label", b"data", b"filenames", b"labels"]
    assert found[b"batch_label"] == b"training batch 1 of 5 \xe9"
    assert found[b"labels"] == [6, 9]
    assert found[b"filenames"] == [b"leptodactylus_pentadactylus_s_000004.png", b"b.png"]
    assert np.array_equal(found[b"data"].numpy(), PIXELS)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("array", [PIXELS, np.asfortranarray(PIXELS), PIXELS[:0], PIXELS[0], PIXELS.reshape(2, 3, 32, 32)])
@pytest.mark.parametrize("key", ["data", b"data"])
def test_what_python_3_and_this_numpy_write(tmp_path, protocol, array, key):
    found = read(tmp_path, pickle.dumps({key: array, "more": [array, 1.5, None, True, (2**70, "é")]}, protocol=protocol))
    assert found[b"data"].dtype == torch.uint8
    assert np.array_equal(found[b"data"].numpy(), array)


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_names_of_both_numpys(tmp_path, module):
    content = python2_file().replace(b"numpy.core.multiarray", module.encode() + b".multiarray")
    assert torch.equal(read(tmp_path, content)[b"data"], torch.from_numpy(PIXELS))


class Evil:
    """Creates a file as soon as it is unpickled."""

    def __init__(self, path: Path, call=os.system) -> None:
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (f"echo ran > {self.path}",)


def touching(path: Path) -> str:
    return f"open({str(path)!r}, 'w').close()"


ATTACKS = {
    "os.system": lambda p: pickle.dumps(Evil(p)),
    "nested in the labels": lambda p: pickle.dumps({b"data": PIXELS, b"labels": [1, [Evil(p)]]}),
    "as a key": lambda p: pickle.dumps({b"data": PIXELS, (1, (Evil(p),)): 2}),
    "after the arrays": lambda p: (
        python2_file()[:-2] + b"U\x01xcposix\nsystem\n(U" + bytes([6 + len(str(p))]) + f"touch {p}".encode() + b"tRu."
    ),
    "builtins.exec": lambda p: b"cbuiltins\nexec\n(V" + touching(p).encode() + b"\ntR.",
    "builtins.eval, by its Python 2 name": lambda p: b"c__builtin__\neval\n(V" + touching(p).encode() + b"\ntR.",
    "builtins.getattr": lambda p: b"cbuiltins\ngetattr\n(cnumpy\nndarray\nV__class__\ntR.",
    "a dotted name": lambda p: b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
    "numpy's own loader": lambda p: b"cnumpy\nload\n(V" + str(p).encode() + b"\ntR.",
    "numpy's runner": lambda p: b"cnumpy.testing._private.utils\nrunstring\n(V" + touching(p).encode() + b"\n}tR.",
    "INST": lambda p: b"(Vtouch " + str(p).encode() + b"\nios\nsystem\n.",
    "OBJ": lambda p: b"(cos\nsystem\nVtouch " + str(p).encode() + b"\no.",
    "NEWOBJ": lambda p: b"\x80\x02csubprocess\nPopen\n(Vtouch\nV" + str(p).encode() + b"\nt\x81.",
    "PERSID": lambda p: b"Psomething\n.",
    "a call of the array": lambda p: b"cnumpy\nndarray\n(K\x01tR.",
    "attributes for a global": lambda p: b"cnumpy\ndtype\n}V__call__\nNsb.",
    "slots of a global": lambda p: b"cnumpy\ndtype\n(N}V_call\ncnumpy\nndarray\nstb.",
    "a global reconstructs another": lambda p: b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(K\x00tU\x01btR.",
    "encode as something else": lambda p: b"c_codecs\nencode\n(Vaa\nVrot13\ntR.",
    "an array of objects": lambda p: pickle.dumps({b"data": np.array([Evil(p), 1], dtype=object)}),
    "a dtype of objects": lambda p: python2_file(code=b"O8"),
    "a structured dtype": lambda p: pickle.dumps({b"data": np.zeros(2, dtype=[("a", "u1"), ("b", "u1")])}),
    "tuples as keys": lambda p: b"}K\x01\x85N" + b"s.",
    "a long int as a key": lambda p: pickle.dumps({2**2000: 1}),
    "doubled tuples as a key": lambda p: b"\x80\x02})" + b"2\x86" * 14 + b"Ns.",
    "tuples doubled through the memo": lambda p: b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 34 + b"Ns.",
    "a shape of long numbers": lambda p: (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01("
        + b"\x8a\x10"
        + b"\x7f" * 16
        + b"tcnumpy\ndtype\n(U\x02u1K\x00K\x01tRI00\nU\x01atb."
    ),
    "a memo of gigabytes": lambda p: b"Nr\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, name):
    target, before = tmp_path / "ran", {key: (value._name, value._call) for key, value in GLOBALS.items()}
    with pytest.raises(ValueError, match="is refused: a CIFAR pickle has no need of"):
        read(tmp_path, ATTACKS[name](target))
    assert not target.exists()
    assert {key: (value._name, value._call) for key, value in GLOBALS.items()} == before
    assert np.array_equal(read(tmp_path, python2_file())[b"data"].numpy(), PIXELS), "and the next file is read as ever"


def test_the_attacks_would_run(tmp_path):
    """With Python's own unpickler: otherwise the test above shows nothing."""
    ran = []
    for name, make in ATTACKS.items():
        target = tmp_path / f"ran {len(ran)}".replace(" ", "_")
        if name in ("a memo of gigabytes", "numpy's own loader") or "tuples" in name:
            continue
        try:
            pickle.loads(make(target), encoding="bytes")
        except Exception:
            continue
        finally:
            if target.exists():
                ran.append(name)
    expected = {"os.system", "nested in the labels", "as a key", "after the arrays", "builtins.exec", "INST", "OBJ", "an array of objects"}
    assert expected <= set(ran)


@pytest.mark.parametrize("start", [b"}", b""])
def test_deep_and_doubled_tuples_are_refused_at_once(tmp_path, start):
    for content in (b")" + b"\x85" * 3_000_000, b")" + b"2\x86" * 34, b"(" * 100_000 + b"t" * 100_000):
        with pytest.raises(ValueError, match="no need of tuples nested deeper than 16"):
            read(tmp_path, b"\x80\x02" + start + content + b"Ns.")


@pytest.mark.parametrize("content", [b"K\x01\x86.", b"t.", b"(0.", b"0.", b"h\x00.", b"}(K\x01u.", b"(K\x01d.", b"(2.", b"gx\n."])
def test_instructions_without_what_they_need(tmp_path, content):
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path, content)


def test_registered_extensions_are_refused(tmp_path):
    target = tmp_path / "ran"
    copyreg.add_extension("os", "system", 240)
    try:
        content = pickle.dumps(Evil(target, importlib.import_module("os").system), protocol=2)
        content = content.replace(b"cposix\nsystem\n", b"\x82\xf0")
        assert b"\x82\xf0" in content
        pickle.loads(content)  # runs, and leaves the function in pickle's cache
        assert target.exists()
        target.unlink()
        with pytest.raises(ValueError, match="the instruction EXT1"):
            read(tmp_path, content)
        assert not target.exists()
    finally:
        copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize(
    "content", [b"", b"\x00hello", python2_file()[:-3], python2_file()[:200], b"\x80\x02]q\x00.", b"\x80\x02}K\x01K\x02s."]
)
def test_damaged_files_name_themselves(tmp_path, content):
    with pytest.raises(ValueError, match=r"data_batch_1 (is no pickle, or it is damaged|must hold a dict)"):
        read(tmp_path, content)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_random_damage_is_an_error_or_another_file(tmp_path_factory, position, byte, cut):
    content = bytearray(python2_file(PIXELS[:, :16]))
    position %= len(content)
    content[position:] = b"" if cut else bytes([byte]) + content[position + 1 :]
    try:
        read(tmp_path_factory.getbasetemp(), bytes(content))
    except ValueError as error:
        assert "data_batch_1" in str(error)  # noqa: PT017 (not every damage is an error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"labels": [0]}, r"has no 'data'; it has"),
        ({b"data": PIXELS}, r"has no 'labels'"),
        ({b"data": [1, 2], b"labels": [0, 1]}, r"'data' must be an array \[n, 3072\], got list"),
        ({b"data": PIXELS[:, 1:], b"labels": [0, 1]}, r"got shape \(2, 3071\)"),
        ({b"data": PIXELS, b"labels": [0]}, "has 2 images, and there are labels of shape"),
        ({b"data": PIXELS, b"labels": [0, 10]}, "'labels' must be from 0 to 9, got 10"),
        ({b"data": PIXELS, b"labels": [0, -1]}, "must be from 0 to 9, got -1"),
        ({b"data": PIXELS, b"labels": [0, 2**80]}, "must be from 0 to 9, got 12089"),
        ({b"data": PIXELS, b"labels": [0, "cat"]}, "must be a list of whole numbers"),
        ({b"data": PIXELS, b"labels": "cats"}, "must be a list of whole numbers, got str"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_cifar10(tmp_path)


def test_the_malicious_file_is_refused_through_the_public_loader(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(ATTACKS["os.system"](tmp_path / "ran"))
    with pytest.raises(ValueError, match=r"train is refused: a CIFAR pickle has no need of posix\.system"):
        load_cifar100(tmp_path)
    assert not (tmp_path / "ran").exists()
