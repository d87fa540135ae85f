"""The cache: whole files or none, damage seen byte by byte, provenance, several writers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from generators.base import Block
from generators.cache import COST_FILE, TRAINED_FILE, BlockCache, stored_folder, weights_hash

BLOCK = Block(5, 1, 2)
IMAGES = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)


def cache(folder: Path, told: list[str] | None = None, weights: str = "first") -> BlockCache:
    tell = (told if told is not None else []).append
    return BlockCache(folder, 2, {"generator": "tones"}, weights, {"torch": "9.9"}, tell)


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def cut(draft: Path) -> None:
        (draft / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored_folder(tmp_path / "weights", cut)
    assert not (tmp_path / "weights").exists()
    assert stored_folder(tmp_path / "weights", lambda draft: (draft / "half").rename(draft / "whole"))
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["whole"]
    assert not stored_folder(tmp_path / "weights", cut)


def test_a_block_comes_back_with_its_provenance(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    assert kept.get(BLOCK) is None
    kept.put(BLOCK, IMAGES)
    assert (kept.get(BLOCK) == IMAGES).all()
    (file,) = tmp_path.rglob("*.safetensors")
    with safe_open(file, "numpy") as content:
        header = content.metadata()
    assert {name: header[name] for name in ("seed", "class", "first", "count", "weights")} == {
        "weights": "first",
        "seed": "5",
        "class": "1",
        "first": "4",
        "count": "2",
    }
    assert json.loads(header["versions"]) == {"torch": "9.9"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {"generator": "tones", "versions": {"torch": "9.9"}}
    kept.put(Block(5, 1, 3), IMAGES[:1])  # a last block may be short
    assert len(kept.get(Block(5, 1, 3))) == 1
    assert sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file()) == [".json", *[".safetensors"] * 2]


def test_no_flipped_bit_and_no_cut_passes(tmp_path: Path) -> None:
    """Every byte of the file in turn; what does no harm (the libraries' versions) gives the images as they were."""
    told: list[str] = []
    kept = cache(tmp_path, told)
    kept.put(BLOCK, IMAGES)
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    harmless = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        found = kept.get(BLOCK)
        harmless += found is not None
        assert found is None or (found == IMAGES).all()
    assert len(told) == len(whole) - harmless > IMAGES.size
    assert "damaged" in told[-1]
    assert str(file) in told[-1]
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert kept.get(BLOCK) is None
    kept.put(BLOCK, IMAGES)
    assert (kept.get(BLOCK) == IMAGES).all()


def test_a_file_in_anothers_place_is_not_taken(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    kept.put(BLOCK, IMAGES)
    (file,) = tmp_path.rglob("*.safetensors")
    file.rename(file.with_name("block_000007.safetensors"))
    assert kept.get(Block(5, 1, 7)) is None


def test_images_of_other_weights_are_not_taken(tmp_path: Path) -> None:
    cache(tmp_path).put(BLOCK, IMAGES)
    told: list[str] = []
    second = cache(tmp_path, told, "second")
    assert second.get(BLOCK) is None
    assert "made by weights of another training" in told[0]
    second.put(BLOCK, IMAGES + 1)
    assert (second.get(BLOCK) == IMAGES + 1).all()
    assert cache(tmp_path).get(BLOCK) is None


def test_a_folders_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    """But for the files that tell of the training, whose seconds are never the same."""
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_bytes(b"abc")
        for about in (TRAINED_FILE, COST_FILE):
            (tmp_path / name / about).write_text(name)
    one, two = tmp_path / "one", tmp_path / "two"
    assert weights_hash(one) == weights_hash(two)
    (two / "deep" / "file").rename(two / "file")
    assert weights_hash(one) != weights_hash(two)
    (one / "deep" / "file").rename(one / "file")
    assert weights_hash(one) == weights_hash(two)
    (two / "file").write_bytes(b"abd")
    assert weights_hash(one) != weights_hash(two)
    (two / "file").write_bytes(b"abc")
    (two / "more").write_bytes(b"")
    assert weights_hash(one) != weights_hash(two)


def test_many_writers_of_one_block_leave_one_whole_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: cache(tmp_path).put(BLOCK, IMAGES), range(40)))
    assert (cache(tmp_path).get(BLOCK) == IMAGES).all()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2  # the block and the manifest


@pytest.mark.parametrize("content", [b"", b"PK", b"\xff" * 500])
def test_foreign_files_are_damaged_ones(tmp_path: Path, content: bytes) -> None:
    told: list[str] = []
    kept = cache(tmp_path, told)
    kept.put(BLOCK, IMAGES)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(content)
    assert kept.get(BLOCK) is None
    assert len(told) == 1


def test_a_claim_is_one_processs_and_what_a_killed_one_has_left_goes(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    claim = kept.claim(BLOCK)
    assert cache(tmp_path).claim(BLOCK) is None
    assert cache(tmp_path).claim(Block(5, 1, 3)) is not None
    claim.release()
    folder = Path(kept._file(BLOCK)).parent
    own, other = f"block_{BLOCK.number:06d}.safetensors", f"block_{BLOCK.number + 1:06d}.safetensors"
    left = [folder / name for name in (f"{own}.lock", f".{own}.4711.0123abcd", f".{other}.4712.0123abcd")]
    for path in left:
        path.touch()
    kept.claim(BLOCK).release()
    assert [path.exists() for path in left] == [False, False, True]
