"""python -m bonus_ops suspects: what it prints and writes, and the one line it says of a wrong file."""

from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from bonus_ops.__main__ import main

N, C = 60, 4
WRONG = (3, 17, 42)


def epoch(seed: int = 0, wrong: tuple[int, ...] = WRONG) -> dict[str, np.ndarray]:
    """Return logits that know the labels but those of three rows."""
    random = np.random.default_rng(seed)
    labels = np.arange(N) % C
    logits = random.normal(size=(N, C)).astype(np.float32)
    logits[np.arange(N), labels] += 6
    given = labels.copy()
    given[list(wrong)] = (labels[list(wrong)] + 1) % C
    return {"logits": logits, "labels": given}


def saved(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        torch.save({name: torch.from_numpy(x) for name, x in arrays.items()}, path)
    return str(path)


@pytest.mark.parametrize(("suffix", "epochs"), [(".npz", 1), (".pt", 3), (".npz", 12)])
def test_rows_with_a_wrong_label_come_first_with_the_right_one_suggested(tmp_path, capsys, suffix, epochs):
    files = [saved(tmp_path / f"{i}{suffix}", epoch(i)) for i in range(epochs)]
    table = tmp_path / "rows.csv"
    assert main(["suspects", *files, "--top", "3", "--csv", str(table)]) == 0
    head, *rows, last = capsys.readouterr().out.strip().split("\n")
    assert head.split("  ")[0].strip() == "index" and len(rows) == 3 and last.startswith("60 rows: ")
    for row in rows:
        index, kind, given, suggested, p_given, p_suggested, *_ = row.split()
        assert int(index) in WRONG and kind in ("suspect_label", "suspect_input")
        assert int(suggested) == int(index) % C and int(given) == (int(index) + 1) % C
        assert float(p_given) < 0.2 < 0.8 < float(p_suggested)
    with open(table, newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == N and lines[3]["given_label"] == "0" and lines[3]["suggested_label"] == "3"


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
def test_the_map_is_drawn(tmp_path):
    assert main(["suspects", saved(tmp_path / "a.npz", epoch()), "--plot", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_without_a_label_are_unknown(tmp_path, capsys):
    arrays = epoch()
    arrays["labels"][:10] = -100
    arrays["logits"][10] = np.nan
    assert main(["suspects", saved(tmp_path / "a.npz", arrays)]) == 0
    assert capsys.readouterr().out.strip().endswith("11 unknown")


@pytest.mark.slow
def test_it_runs_as_a_module(tmp_path):
    file = saved(tmp_path / "a.npz", epoch())
    run = subprocess.run([sys.executable, "-m", "bonus_ops", "suspects", file], capture_output=True, text=True)
    assert run.returncode == 0 and "suspect_label" in run.stdout and not run.stderr


def pickled(path):
    np.savez(path, logits=np.zeros((2, 2)), labels=np.array([{}, None], dtype=object))


def other(**arrays):
    return lambda path: np.savez(path, **{name: x for name, x in (epoch() | arrays).items() if x is not None})


WRONG_FILES = {
    "missing": (lambda path: None, "no such file"),
    "no npz": (lambda path: path.write_text("hello"), "cannot be read as plain arrays"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as plain arrays"),
    "other keys": (
        lambda path: np.savez(path, x=np.zeros(3)),
        "expected logits and labels, lacks logits and labels; has x",
    ),
    "no labels": (other(labels=None), "lacks labels; has logits"),
    "objects": (pickled, "cannot be read as plain arrays .*: .* arrays of objects, which are never unpickled$"),
    "fewer labels": (other(labels=np.zeros(3, int)), r"labels must have shape \[60\], got \[3\]"),
    "soft labels": (other(labels=np.zeros((N, C))), "labels must be integers, got torch.float64"),
    "float labels": (other(labels=np.zeros(N)), "labels must be integers, got torch.float64"),
    "large label": (other(labels=np.full(N, C)), r"labels must be in \[0, 4\), or -100 for none, got 4"),
    "negative label": (other(labels=np.full(N, -1)), r"labels must be in \[0, 4\), or -100 for none, got -1"),
    "text": (other(labels=np.array(["a"] * N)), "labels must be an array of numbers, got <U1"),
    "whole logits": (other(logits=np.zeros((N, C), int)), r"logits must be floating point \[N, C\], got torch.int64"),
    "another byte order": (other(logits=np.zeros((N, C), ">f4")), "logits must be an array of numbers, got >f4"),
    "float8 logits": (
        lambda path: torch.save({"logits": torch.zeros(N, C).to(torch.float8_e5m2), "labels": torch.zeros(N)}, path),
        r"logits must be floating point \[N, C\], got torch.float8_e5m2",
    ),
    "sparse logits": (
        lambda path: torch.save({"logits": torch.eye(N).to_sparse(), "labels": torch.zeros(N)}, path),
        "logits must be an array of numbers, got torch.sparse_coo",
    ),
    "numbers for names": (lambda path: torch.save({1: torch.eye(2)}, path), "lacks logits and labels; has 1"),
    "flat logits": (other(logits=np.zeros(N)), r"logits must be floating point \[N, C\], got torch.float64 \[60\]"),
    "no rows": (other(logits=np.zeros((0, C)), labels=np.zeros(0, int)), "holds no rows"),
    "no class": (other(logits=np.zeros((N, 0))), r"logits must be floating point \[N, C\]"),
    "all ignored": (other(labels=np.full(N, -100)), "no row has a label"),
}
PT = ("float8 logits", "sparse logits", "numbers for names")


def says(arguments, capsys):
    """Return the one line that a wrong call says."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("fault", WRONG_FILES)
def test_of_a_wrong_file_one_line_is_said_and_nothing_is_written(tmp_path, capsys, fault):
    make, match = WRONG_FILES[fault]
    path = tmp_path / ("a.pt" if fault in PT else "a.npz")
    make(path)
    good, before = saved(tmp_path / "b.npz", epoch()), sorted(tmp_path.iterdir())
    alone, second = [str(path)], [good, str(path)]
    for files in (alone, second) if fault != "all ignored" else (alone,):
        err = says(["suspects", *files, "--csv", str(tmp_path / "t.csv"), "--plot", str(tmp_path / "m.png")], capsys)
        match = match if files is alone or fault != "no rows" else "logits must have the shape of"
        assert err.startswith("python -m bonus_ops suspects: ") and re.search(path.name + ": .*" + match, err), err
    assert sorted(tmp_path.iterdir()) == before


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_is_never_run(tmp_path, capsys):
    torch.save({"logits": torch.zeros(2, 2), "labels": Evil()}, tmp_path / "a.pt")
    assert "a.pt: cannot be read as plain tensors" in says(["suspects", str(tmp_path / "a.pt")], capsys)
    torch.save([1, 2], tmp_path / "b.pt")
    assert "b.pt: expected a dict with logits and labels, got list" in says(
        ["suspects", str(tmp_path / "b.pt")], capsys
    )
    torch.save({"logits": [1.0], "labels": "a"}, tmp_path / "c.pt")
    assert "c.pt: logits must be an array of numbers, got list" in says(["suspects", str(tmp_path / "c.pt")], capsys)


def test_a_wrong_call_is_one_line_too(tmp_path, capsys):
    good = saved(tmp_path / "a.npz", epoch())
    small = saved(tmp_path / "small.npz", {"logits": np.zeros((3, C)), "labels": np.zeros(3, int)})
    for arguments, match in (
        ([], "the following arguments are required"),
        (["suspects"], "the following arguments are required: FILE"),
        (["suspect", good], "invalid choice: 'suspect'"),
        (["suspects", good, "--top", "-1"], "argument --top: top must be at least 0, got -1"),
        (["suspects", good, "--share", "2"], "argument --share: share must be in [0, 1], got 2.0"),
        (["suspects", good, small], "small.npz: logits must have the shape of"),
        (["suspects", good, "--csv", str(tmp_path / "no" / "t.csv")], "t.csv: no such folder"),
        (["suspects", str(tmp_path / "a.txt")], "no such file"),
        (["suspects", str(tmp_path)], "no such file"),
    ):
        assert match in says(arguments, capsys)
    (tmp_path / "a.csv").write_text("")
    assert "a.csv: expected a file .npz, .pt or .pth" in says(["suspects", str(tmp_path / "a.csv")], capsys)


def test_nothing_is_written_where_one_of_two_files_cannot_be(tmp_path, capsys):
    good, folder = saved(tmp_path / "a.npz", epoch()), tmp_path / "folder"
    folder.mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for table, plot, match in (
        (folder, tmp_path / "map.png", "folder: expected a file to write, got a folder"),
        (tmp_path / "t.csv", folder, "folder: expected a file to write, got a folder"),
        (good, tmp_path / "map.png", "a.npz: expected a file of its own to write, got one that this call uses already"),
        (tmp_path / "t.png", tmp_path / "t.png", "t.png: expected a file of its own to write"),
    ):
        assert match in says(["suspects", good, "--csv", str(table), "--plot", str(plot)], capsys)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_epochs_whose_rows_come_in_another_order_are_refused(tmp_path, capsys):
    arrays = epoch()
    files = [saved(tmp_path / "a.npz", arrays), saved(tmp_path / "b.npz", {k: x[::-1] for k, x in arrays.items()})]
    assert "b.npz: labels must be those of" in says(["suspects", *files], capsys)
    arrays["labels"] = np.where(np.arange(N) < 5, -100, arrays["labels"])  # rows that are left out may differ
    assert main(["suspects", files[0], saved(tmp_path / "c.npz", arrays)]) == 0
