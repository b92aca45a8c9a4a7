"""`splice batch`: rows, what is finished, bad rows, interruption, and what it says of bad input."""

import csv
import multiprocessing
import socket
import sys
import time

import numpy as np
import pytest
import torch

from splice_engine import OFFLINE_BACKBONE, Settings, load_picture, preset, save_picture
from splice_engine.batch.job import Job, ViT
from splice_engine.batch.processes import ATTEMPTS, Processes
from splice_engine.batch.table import read_table
from splice_engine.images import resize

ON_CPU = ("--backbone", OFFLINE_BACKBONE, "--device", "cpu", "--dtype", "fp32")
QUICK = ("--preset", "paper", "--steps", 1, "--size", 64, "--vit-size", 56, "--quiet")


@pytest.fixture
def pictures(tmp_path, pair):
    """A folder with a pair of pictures, a mask, and files that are none."""
    folder = tmp_path / "in"
    folder.mkdir()
    save_picture(resize(pair[0], (72, 88)), folder / "a.png")
    save_picture(resize(pair[1], (80, 66)), folder / "b.png")
    mask = torch.zeros(1, 3, 72, 88)
    mask[..., :40] = 1
    save_picture(mask, folder / "mask.png")
    save_picture(0 * mask, folder / "black.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:500])
    return folder


@pytest.fixture
def write_table(pictures):
    """Writes a table beside the pictures."""

    def write(text, name="pairs.csv", encoding="utf-8"):
        path = pictures / name
        path.write_text(text, encoding=encoding, newline="")
        return path

    return write


def read_results(folder):
    with (folder / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        return {row.pop("row"): row for row in csv.DictReader(file)}


def snapshot(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.is_file()}


def test_a_batch_goes_on_where_it_stopped(splice, write_table, pictures, tmp_path):
    """Bad rows are told and skipped, a result is what `splice transfer` gives, and one of other settings stays."""
    lines = [
        "structure;appearance;structure-mask;output;preset;seed;blur",
        "a.png;b.png;;one.png;;;",
        "a.png;none.png;;;;;",
        "a.png;b.png;mask.png;two.jpg;paper;3;0,5",
        "",
        "a.png;b.png;mask.png;three.png;paper-10k;3;0.5",
        "broken.png;b.png;;;;;",
        "b.png;a.png;;;;;",
    ]
    table, folder = write_table("\r\n".join(lines), encoding="utf-8-sig"), tmp_path / "out"
    command = ("batch", table, "-o", folder, *ON_CPU, *QUICK)
    ended = splice(*command)
    assert ended.status == 1
    assert "3 of 6 pairs done" in ended.out
    assert "3 failed" in ended.out
    complaints = {3: "none.png: check the cell", 4: "blur must be a number, not '0,5'", 7: "broken.png is damaged"}
    assert [line.split(":")[1].strip() for line in ended.complaint] == [f"row {number}" for number in complaints]
    for line, words in zip(ended.complaint, complaints.values(), strict=True):
        assert words in line
    results = read_results(folder)
    assert {number for number, row in results.items() if row["error"]} == {str(number) for number in complaints}
    for number, name in (("2", "one.png"), ("6", "three.png"), ("8", "b-a.png")):
        assert results[number]["output"] == name
        assert float(results[number]["structure_distance"]) > 0
        assert float(results[number]["seconds"]) > 0
        assert (folder / "strips" / f"{name}.jpg").is_file()
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert all(f'alt="{name}" src="strips/{name}.jpg"' in page for name in ("one.png", "three.png", "b-a.png"))
    assert "row 4: blur must be" in page

    single = tmp_path / "single.png"
    recipe = ("--steps", 1, "--size", 64, "--vit-size", 56, "--quiet", "--seed", 3, "--blur", 0.5)
    splice(
        *("transfer", pictures / "a.png", pictures / "b.png", "--structure-mask", pictures / "mask.png"),
        *("-o", single, *ON_CPU, "--preset", "paper-10k", *recipe),
    )
    assert torch.equal(load_picture(folder / "three.png"), load_picture(single))

    before = snapshot(folder), snapshot(folder / "strips")
    (folder / "one.png").unlink()
    lines[3], lines[7] = lines[3].replace("0,5", "0.5"), "b.png;a.png;;;;1;"
    write_table("\n".join(lines), encoding="utf-8-sig")
    ended = splice(*command)
    assert (ended.status, len(ended.complaint)) == (1, 3)
    assert "3 of 6 pairs done" in ended.out
    assert "(1 were there already), 3 failed" in ended.out
    assert "row 8: " in ended.complaint[2]
    assert "b-a.png is there already, made of other pictures or settings" in ended.complaint[2]
    after = snapshot(folder)
    for name in ("three.png", "b-a.png"):
        assert after[name] == before[0][name]
    assert after["one.png"][1] == before[0]["one.png"][1]
    assert "(3 were there already), 2 failed" in splice(*command, "--overwrite").out
    assert snapshot(folder)["b-a.png"][1] != after["b-a.png"][1]


def test_what_was_killed_goes_on(start, splice, write_table, pictures, tmp_path):
    """No result of it is done twice, none is half written, and no process of it is left."""
    names = [f"{number}.png" for number in range(5)]
    text = "structure,appearance,output,seed\n" + "".join(f"a.png,b.png,{name},{name[0]}\n" for name in names)
    folder = tmp_path / "out"
    command = ("batch", write_table(text), "-o", folder, *ON_CPU, *QUICK)
    child = start(*command)
    try:
        while len(list(folder.glob("records/?.png.json"))) < 2:
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        child.kill()
        child.communicate()
    (folder / ".splice-0123456789ab.png").write_bytes(b"half")
    records = snapshot(folder / "records")
    finished = {name: snapshot(folder)[name] for name in names if f"{name}.json" in records}
    assert 2 <= len(finished) < len(names)
    ended = splice(*command)
    assert (ended.status, ended.err) == (0, "")
    assert "5 of 5 pairs done" in ended.out
    assert f"({len(finished)} were there already)" in ended.out
    after = snapshot(folder)
    assert {name: after[name] for name in finished} == finished
    assert not list(folder.rglob(".splice-*"))
    assert [row["seed"] for row in read_results(folder).values()] == [name[0] for name in names]
    single = tmp_path / "single.png"
    splice("transfer", pictures / "a.png", pictures / "b.png", "-o", single, *ON_CPU, *QUICK, "--seed", 4)
    assert after["4.png"][1] == single.read_bytes()


def test_a_process_that_dies_is_replaced():
    """Its job is begun again, and given up at last: another row may be worked on."""
    job = Job(
        2, "", "a.png", {"structure": np.zeros((1, 3, 64, 64))}, Settings(), 1, ViT(OFFLINE_BACKBONE, "cpu", "fp32")
    )
    workers = Processes(["cpu"])
    try:
        workers.give(job)
        assert not workers.has_room
        outcomes = []
        for _ in range(ATTEMPTS):
            assert outcomes == []
            (child,) = multiprocessing.active_children()
            child.kill()
            outcomes = list(workers.wait())
        ((_, outcome),) = outcomes
        assert f"died {ATTEMPTS} times" in outcome.error
        assert not outcome.ends_batch
        assert workers.has_room
        assert not workers.is_busy
    finally:
        workers.close()
    assert multiprocessing.active_children() == []


ROW = "a.png,b.png"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty: its first row names the columns"),
        ("structure,appearance\n", "has no row below its header"),
        (f"structure,appearence\n{ROW}", "a column 'appearence', which is no setting of a transfer: did you mean 'app"),
        (f"structure,zzz\n{ROW}", "a column 'zzz', which is no setting of a transfer: leave it out"),
        ("structure\na.png", "has no column 'appearance'"),
        (f"structure,appearance,seed,Seed\n{ROW},1,2", "has the column 'seed' twice"),
        (f"structure,appearance\n{ROW}\0", "is not UTF-8 text: save the table as CSV UTF-8"),
        (f"structure,appearance\n{ROW}{'x' * 140_000}", "is no table (field larger than"),
    ],
)
def test_a_table_that_is_none_is_refused(splice, write_table, tmp_path, text, words):
    result = splice("batch", write_table(text), "-o", tmp_path / "out", *ON_CPU)
    assert result.status == 2
    assert len(result.complaint) == 1
    assert words in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "row", "words"),
    [
        ("", ",b.png", "the cell 'structure' is empty"),
        ("", "a.png,none.png", "none.png: check the cell 'appearance'"),
        ("structure_mask", f"{ROW},none.png", "no mask at"),
        ("output", f"{ROW},sub/x.png", "the output 'sub/x.png' is in a folder"),
        ("output", f"{ROW},x.gif", "the output 'x.gif' is no name of a picture"),
        ("output", f"{ROW},{'x' * 250}.png", "has more than 200 bytes"),
        ("output", f"{ROW},GOOD.png", "row 2 has the output GOOD.png too"),
        ("preset", f"{ROW},best", "unknown preset 'best'"),
        ("steps", f"{ROW},ten", "steps must be a whole number, not 'ten'"),
        ("steps", f"{ROW},0", "steps must be at least 1, not 0"),
        ("best_of", f"{ROW},17", "best_of must be a whole number from 1 to 16, not '17'"),
        ("size", f"{ROW},large", "size must be a whole number or full, not 'large'"),
        ("jitter", f"{ROW},much", "jitter must be a number, not 'much'"),
        ("compile", f"{ROW},perhaps", "compile must be true or false, not 'perhaps'"),
        ("seed", f"{ROW},1,2", "4 cells for 3 columns"),
    ],
)
def test_a_bad_row_is_told_and_the_others_stay(write_table, columns, row, words):
    header = f"structure,appearance{columns and ','}{columns}"
    good = "a.png,b.png,good.png" if columns == "output" else "a.png,b.png"
    table = read_table(write_table(f"{header}\n{good}\n{row}\n"), "draft", {"steps": 5})
    assert [kept.number for kept in table.rows] == [2]
    assert table.rows[0].settings == preset("draft", steps=5)
    assert table.errors.keys() == {3}
    assert words in table.errors[3]


def test_cells_are_settings(write_table):
    """As options: hyphens or underscores, empty cells for what is not given; a row outranks the command line."""
    text = (
        "Structure,appearance,--warm-steps,size,compile,preset,best-of\na.png,b.png,4,full,yes,draft,2\na.png,a.png\n"
    )
    rows = read_table(write_table(text), "paper", {"warm_steps": 2, "seed": 9}).rows
    assert rows[0].settings == preset("draft", warm_steps=4, size=None, compile=True, seed=9)
    assert rows[1].settings == preset("paper", warm_steps=2, seed=9)
    assert [row.best_of for row in rows] == [2, 1]
    assert [row.output for row in rows] == ["a-b.png", "a-a.png"]


def make_other_batch(folder):
    (folder / "batch.json").write_text('{"format": "splice-batch-1", "table": "/other/pairs.csv"}')


def make_other_files(folder):
    (folder / "holiday.jpg").write_bytes(b"")


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (make_other_batch, "the folder of another batch, that of /other/pairs.csv: name another"),
        (make_other_files, "holds other files: name a new folder"),
        (lambda folder: (folder / "batch.json").write_text("{}"), "holds other files"),
    ],
)
def test_a_folder_of_other_things_is_refused(splice, write_table, tmp_path, fill, words):
    folder = tmp_path / "out"
    folder.mkdir()
    fill(folder)
    before = snapshot(folder)
    result = splice("batch", write_table(f"structure,appearance\n{ROW}"), "-o", folder, *ON_CPU)
    assert result.status == 2
    assert len(result.complaint) == 1
    assert words in result.err
    assert snapshot(folder) == before


def test_missing_weights_end_a_batch_at_once(splice, write_table, tmp_path):
    """Nothing is written."""
    (tmp_path / "weights.safetensors").write_bytes(b"none")
    for backbone, words in (("no_such_vit", "no_such_vit"), (tmp_path / "weights.safetensors", "weights.safetensors")):
        result = splice(
            *("batch", write_table(f"structure,appearance\n{ROW}"), "-o", tmp_path / "out"),
            *("--backbone", backbone, "--device", "cpu", "--quiet"),
        )
        assert result.status == 2
        assert len(result.complaint) == 1
        assert words in result.err
        assert not (tmp_path / "out").exists()


def test_ray_is_an_extra(splice, write_table, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    table = write_table(f"structure,appearance\n{ROW}")
    result = splice("batch", table, "-o", tmp_path / "out", "--ray", "127.0.0.1:6379")
    assert result.status == 2
    assert len(result.complaint) == 1
    assert "-m pip install ray" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("listens", [False, True])
def test_an_address_without_ray_is_told(splice, write_table, tmp_path, listens):
    """Also where something else listens there."""
    pytest.importorskip("ray", reason="ray is not installed")
    table = write_table(f"structure,appearance\n{ROW}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        result = splice("batch", table, "-o", tmp_path / "out", "--ray", address)
    assert result.status == 2
    assert len(result.complaint) == 1
    assert f"no Ray cluster answers at {address}" in result.err
    assert not (tmp_path / "out").exists()
