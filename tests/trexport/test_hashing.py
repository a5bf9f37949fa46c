import hashlib
import subprocess
from pathlib import Path

from trexport.hashing import hash_of_tensors, sha256_of_file, sha256_of_folder


def test_a_file_s_hash_is_what_sha256sum_prints(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(range(256)) * 5000)
    printed = subprocess.run(["sha256sum", str(file)], capture_output=True, text=True, check=True).stdout
    assert sha256_of_file(file) == printed.split()[0]


def test_a_folder_s_hash_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "one").write_text("1")
        (tmp_path / name / "sub" / "two").write_text("2")
    first = sha256_of_folder(tmp_path / "a")
    assert first == sha256_of_folder(tmp_path / "b")
    (tmp_path / "b" / "sub" / "two").write_text("3")
    assert first != sha256_of_folder(tmp_path / "b")
    (tmp_path / "b" / "sub" / "two").rename(tmp_path / "b" / "sub" / "three")
    assert first != sha256_of_folder(tmp_path / "b")


def test_a_model_s_hash_does_not_depend_on_the_order_of_its_tensors() -> None:
    one, two = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"2").hexdigest()
    pairs = [("x", (one, "F32", (2, 3))), ("y", (two, "F16", ()))]
    assert hash_of_tensors(dict(pairs)) == hash_of_tensors(dict(reversed(pairs)))
    assert hash_of_tensors(dict(pairs)) != hash_of_tensors({"x": (one, "F32", (3, 2)), "y": pairs[1][1]})
    assert hash_of_tensors(dict(pairs)) != hash_of_tensors({"x": (one, "F32", (2, 3)), "z": pairs[1][1]})
