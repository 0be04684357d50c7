"""Arguments that the benchmarks' commands share: what cannot be is refused before anything is measured."""

from __future__ import annotations

import argparse
import json

import pytest

from bench import arguments, curve_cost, fit_cost_model, growth, layers, overhead, retraining

COMMANDS = {
    "overhead": overhead.main, "growth": growth.main, "curve_cost": curve_cost.main, "layers": layers.main,
    "fit_cost_model": fit_cost_model.main, "retraining": lambda _: retraining.main(),
}


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command that has to end with code 2, and gives what it said."""
    def run(command, *given):
        monkeypatch.setattr("sys.argv", ["bench", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            COMMANDS[command](list(map(str, given)))
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_written_is_refused_before_measuring(command, refused, tmp_path):
    (tmp_path / "file").write_text("")
    for out, why in ((tmp_path, "it is a folder"), (tmp_path / "file" / "x.json", "file")):
        said = refused(command, "--out", out)
        assert f"'{out}' cannot be written" in said and why in said and "expected a file in a folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["overhead", "growth", "curve_cost", "retraining"])
def test_a_table_of_no_result_file_is_refused_by_name(command, refused, tmp_path):
    other = tmp_path / "other.json"
    for content in (None, "{", "[]", "{}", json.dumps({"what": "abacus", "machine": {"kind": "k"}, "command": [],
                                                        "results": []})):
        if content is not None:
            other.write_text(content)
        assert str(other) in refused(command, "--table", other)
    assert str(tmp_path) in refused(command, "--table", tmp_path)


def test_a_file_s_folder_is_made_and_nothing_is_left_in_it(tmp_path):
    out = tmp_path / "new" / "x.json"
    assert arguments.out_file(str(out)) == out and not list(out.parent.iterdir())
    out.write_text("before")
    assert arguments.out_file(str(out)) == out and out.read_text() == "before"


def test_repeats_are_dropped_in_order():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", nargs="+", type=int, action=arguments.EachOnce, default=[1])
    assert parser.parse_args(["--batch", "3", "2", "3", "1", "2"]).batch == [3, 2, 1]
    assert parser.parse_args([]).batch == [1]
