"""The schedule of GPU measurements: order, deadline, time limits, and results that are kept."""

from __future__ import annotations

import argparse
import json
import runpy
import sys

import pytest
from gpu import Measurement, Results, add_missing_commands, digest_of_code, measurements, run, run_schedule
from gpu_step import PRELUS, replace_prelus
from torch import nn


class FakeMachine:
    """Runs measurements on a clock of its own: each takes its usual time, unless ``durations`` says otherwise."""

    def __init__(self, **durations: float):
        self.now, self.durations, self.started = 0.0, durations, []

    def clock(self) -> float:
        return self.now

    def run(self, measurement: Measurement, limit_s: float) -> dict:
        self.started.append(measurement.name)
        seconds = self.durations.get(measurement.name, measurement.usual_s)
        self.now += min(seconds, limit_s)
        return {"status": "done" if seconds <= limit_s else f"killed after {limit_s:g} s", "seconds": seconds}


def schedule(**usual: float) -> list[Measurement]:
    return [Measurement(name, (), seconds, limit_s=2 * seconds) for name, seconds in usual.items()]


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path, "Some GPU, torch 2")


def run_on(machine, measurements, results, minutes):
    run_schedule(measurements, results, minutes, machine.run, machine.clock)


def test_measurements_run_in_order_until_the_deadline_and_later_short_ones_fill_the_rest(results, capsys):
    machine = FakeMachine()
    run_on(machine, schedule(a=30, b=60, c=40, d=20), results, minutes=2)
    assert machine.started == ["a", "b", "d"]
    assert machine.now <= 120
    assert "left out: c: 30 s left, it takes 40" in capsys.readouterr().out


def test_what_is_done_is_not_run_again_and_what_failed_is(results, tmp_path):
    run_on(FakeMachine(b=1000), schedule(a=10, b=10, c=10), results, minutes=1)
    again = FakeMachine()
    run_on(again, schedule(a=10, b=10, c=10, d=10), Results(tmp_path, "Some GPU, torch 2"), minutes=1)
    assert again.started == ["b", "d"]


def test_a_measurement_that_hangs_ends_at_its_limit_and_never_after_the_deadline(results):
    machine = FakeMachine(a=1000, b=1000)
    run_on(machine, schedule(a=20, b=50), results, minutes=1.5)
    assert machine.now == 90
    assert results.content["measurements"]["a"]["status"] == "killed after 40 s"
    assert results.content["measurements"]["b"]["status"] == "killed after 50 s"


def test_each_result_is_written_at_once(results):
    machine = FakeMachine()

    def run_and_look(measurement, limit_s):
        if machine.started:
            assert json.loads(results.file.read_text())["measurements"].keys() == {*machine.started}
            assert machine.started[-1] in results.table.read_text()
        return machine.run(measurement, limit_s)

    run_schedule(schedule(a=1, b=1, c=1), results, 1, run_and_look, machine.clock)
    assert len(machine.started) == 3


def python(code: str) -> Measurement:
    return Measurement("python", (sys.executable, "-c", code, "{result}"), usual_s=1, limit_s=60)


def test_a_process_that_writes_a_result_is_done():
    outcome = run(python("import sys; open(sys.argv[1], 'w').write('[1]')"), limit_s=60)
    assert (outcome["status"], outcome["result"]) == ("done", [1])


@pytest.mark.parametrize(
    ("code", "limit_s", "status"),
    [("print('why'); raise SystemExit(3)", 60, "failed with exit status 3"),
     ("import time; print('why', flush=True); time.sleep(60)", 2, "killed after 2 s")],
)  # fmt: skip
def test_a_process_that_fails_leaves_the_end_of_its_output(code, limit_s, status):
    outcome = run(python(code), limit_s)
    assert outcome["status"] == status
    assert "why" in outcome["output"]


@pytest.fixture
def planned(tmp_path):
    (tmp_path / "MIS-FM").mkdir()
    return measurements(argparse.Namespace(peers=tmp_path))


def test_every_scheduled_command_is_accepted_by_its_script(planned, monkeypatch):
    """Each script parses its arguments and is then ended."""
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self, *args):
        parse(self, *args)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    assert len({measurement.name for measurement in planned}) == len(planned)
    for measurement in planned:
        assert measurement.usual_s < measurement.limit_s <= 9 * 60
        _, script, *arguments = measurement.command
        if script == "-m":  # pytest
            continue
        monkeypatch.setattr("sys.argv", [script, *(word.format(result="file") for word in arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        assert ended.value.code == 0, measurement.name


def test_the_first_nine_minutes_measure_pct_net_beside_misfm(planned, results):
    machine = FakeMachine()
    run_on(machine, planned, results, minutes=9)
    assert machine.started[:3] == [
        "step: MIS-FM's PCT-Net",
        "step: PCT-Net, eager",
        "step: PCT-Net, compiled",
    ]
    assert 8 * 60 < machine.now <= 9 * 60


def test_a_killed_measurement_leaves_the_earlier_results_readable(results, tmp_path):
    run_on(FakeMachine(), schedule(a=1), results, minutes=1)
    assert Results(tmp_path, "Some GPU, torch 2").is_done("a")
    assert results.content["measurements"]["a"]["code"] == digest_of_code()


def test_commands_that_are_not_installed_are_made(tmp_path, monkeypatch):
    """Then they work wherever the packages are on PYTHONPATH."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    add_missing_commands(tmp_path)
    assert "nnunetv2_vf.cli" in (tmp_path / "nnUNetv2_vf").read_text()
    assert "run_training_entry" in (tmp_path / "nnUNetv2_train").read_text()


def test_prelus_keep_their_slopes():
    network = nn.Sequential(nn.PReLU(init=0.1))
    replace_prelus(network, PRELUS["ours"])
    assert type(network[0]) is PRELUS["ours"]
    assert network[0].weight.item() == pytest.approx(0.1)
    assert [*network.state_dict()] == ["0.weight"]
