"""Two processes on a CPU (gloo): the loop gives the numbers of one, replicated (DDP) and in shards (FSDP 2).

accelerate turns FSDP on for accelerators alone, so that `FSDP` below flips its switch by hand; all that follows, from
`fully_shard` to the optimiser's parameters, is accelerate's and torch's own, as on GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from preflab.llm_bridge.training import setup as training_setup
from preflab.llm_bridge.training.setup import full, like
from safetensors.torch import load_file

WORKER = r"""
import json, sys
from pathlib import Path

import numpy as np
import torch

source, out, jobs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, source)
torch.set_num_threads(1)
from accelerate import Accelerator
from preflab.llm_bridge.policy import TransformerPolicy
from preflab.llm_bridge.tiny import tiny_model
from preflab.llm_bridge.training import TrainSettings, train
from preflab.llm_bridge.training.records import Record

END, V = 2, 7
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, V, size=RNG.integers(1, 4)).tolist() for _ in range(7)]


def completion():
    return tuple(RNG.integers(3, V, size=RNG.integers(1, 5)).tolist()) + (END,)


RECORDS = [Record(tuple(PROMPTS[i % 7]), completion(), completion(), 0.8) for i in range(11)]


class Judge:
    name = "odd"

    def rewards(self, prompts, completions):
        return np.array([np.mean([t % 2 for t in y]) for y in completions])

    def preferences(self, prompts, first, second):
        return 1 / (1 + np.exp(self.rewards(prompts, second) - self.rewards(prompts, first)))


def accelerator_of(kind):
    if kind is None:
        return None
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"],
        reshard_after_forward=True, cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def policy_of():
    model = tiny_model(V, context=16, width=8, layers=2, seed=3)
    return TransformerPolicy(model, end_ids=[END], pad_id=END, vocabulary=V, context=16)


for job in jobs:
    method, folder = job["method"], out / job["name"]
    settings = TrainSettings(device="cpu", log_with=None, horizon=4, sample_prompts=2, **job["settings"])
    data = {"records": RECORDS} if method == "dpo" else {"prompts": PROMPTS, "judge": Judge()}
    policy, accelerator = policy_of(), accelerator_of(job["kind"])
    done = train(policy, method, settings=settings, folder=folder, resume=job.get("resume", False),
                 accelerator=accelerator, **data)
    if job["kind"] == "fsdp":
        assert all(type(p).__name__ == "DTensor" for p in policy.model.parameters()), "not in shards"
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (out / f"{job['name']}_{rank}.json").write_text(json.dumps([dict(row) for row in done.metrics]))
if torch.distributed.is_initialized():  # else gloo's threads may outlive the interpreter, and terminate it
    torch.distributed.destroy_process_group()
"""

SGD = {"steps": 4, "batch": 6, "round_batches": 2, "learning_rate": 0.1, "optimiser": "sgd"}
ADAM = {**SGD, "optimiser": "adamw", "learning_rate": 1e-2, "adam_epsilon": 1e-3, "max_grad_norm": 0.05}
RUNS = {
    # a batch of 5 over two processes is 3 rows and 2; micro-batches of 2 are then 2 + 1 and 2 + nothing
    "nash_md": {"method": "nash_md", "settings": {**SGD, "batch": 5, "micro_batch": 2}},
    "nash_ema": {"method": "nash_ema", "settings": SGD},
    "dpo": {"method": "dpo", "settings": ADAM},
    "inpo": {"method": "inpo", "settings": {**ADAM, "checkpoint_every": 2}},
}


def run(processes: int, out: Path, jobs: list[dict[str, object]]) -> list[str]:
    """The worker on so many processes; what each said when it failed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out.mkdir(exist_ok=True)
    (out / "worker.py").write_text(WORKER, encoding="utf-8")
    source = str(Path(__file__).parents[1] / "src")
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": 1,
        }
        environment = {**os.environ, **{k: str(v) for k, v in place.items()}} if processes > 1 else None
        command = [sys.executable, str(out / "worker.py"), source, str(out), json.dumps(jobs)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = []
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            said += [errors] if process.returncode else []
    finally:
        for process in started:
            process.kill()
    return said


def jobs_of(kind: str | None) -> list[dict[str, object]]:
    every = [{**job, "name": name, "kind": kind} for name, job in RUNS.items()]
    first = {**RUNS["inpo"], "name": "resumed", "kind": kind}
    cut = {**first, "settings": {**RUNS["inpo"]["settings"], "steps": 2}}
    return [*every, cut, {**first, "resume": True}, {**cut, "name": "half"}]


pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="gloo as on POSIX")]
PLACES = {"one": (1, None), "ddp": (2, None), "fsdp": (2, "fsdp")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """name -> the folder of the runs by one process, by two with DDP, or by two with FSDP."""
    found: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in found:
            processes, kind = PLACES[name]
            out = tmp_path_factory.mktemp(name)
            said = run(processes, out, jobs_of(kind))
            assert not said, "\n\n".join(said)
            found[name] = out
        return found[name]

    return folder


def last(folder: Path, run_name: str) -> dict[str, torch.Tensor]:
    checkpoints = folder / run_name / "checkpoints"
    pointer = json.loads((checkpoints / "last.json").read_text())
    return load_file(checkpoints / pointer["folder"] / "weights.safetensors")


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def rows(folder: Path, run_name: str, rank: int = 0) -> list[dict[str, float]]:
    """The metrics, without the times."""
    found = json.loads((folder / f"{run_name}_{rank}.json").read_text())
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in found]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("run_name", list(RUNS))
def test_two_processes_give_the_numbers_of_one(ran, kind, run_name):
    alone, together = ran("one"), ran(kind)
    assert json.loads((alone / run_name / "run.json").read_text())["processes"] == 1
    about = json.loads((together / run_name / "run.json").read_text())
    assert about["processes"] == 2
    assert about["start"] == json.loads((alone / run_name / "run.json").read_text())["start"]
    assert gap(last(alone, run_name), last(together, run_name)) < 1e-13
    for mine, theirs in zip(rows(alone, run_name), rows(together, run_name), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-10, abs=1e-13)
    assert rows(together, run_name, 0) == rows(together, run_name, 1)
    lines = [
        len((folder / run_name / "metrics.jsonl").read_text().splitlines()) for folder in (alone, together)
    ]
    assert lines == [4, 4]  # one process writes
    samples = [
        [
            json.loads(line)["completion"]
            for line in (folder / run_name / "samples.jsonl").read_text().splitlines()
        ]
        for folder in (alone, together)
    ]
    assert samples[0] == samples[1]
    assert len(samples[0]) == (0 if run_name == "dpo" else 4)


@pytest.mark.parametrize("kind", ["one", "ddp", "fsdp"])
def test_a_run_that_goes_on_is_the_run_that_did_not_stop(ran, kind):
    """Bit for bit, with Adam's moments; and the weights had moved on from those of the checkpoint."""
    whole, resumed = last(ran(kind), "inpo"), last(ran(kind), "resumed")
    assert gap(whole, resumed) == 0
    halfway = load_file(ran(kind) / "inpo" / "checkpoints" / "step_000002" / "weights.safetensors")
    assert gap(whole, halfway) > 1e-4


def test_a_run_goes_on_with_another_number_of_processes(ran, tmp_path):
    """Begun in shards on two, ended by one."""
    shutil.copytree(ran("fsdp") / "half", tmp_path / "half")
    said = run(1, tmp_path, [{**RUNS["inpo"], "name": "half", "kind": None, "resume": True}])
    assert not said, "\n".join(said)
    assert [row["step"] for row in rows(tmp_path, "half")] == [3, 4]
    assert gap(last(ran("one"), "inpo"), last(tmp_path, "half")) < 1e-13


def test_the_comparison_sees_a_difference(ran):
    """Control: other methods, and one step more, are far from equal."""
    assert gap(last(ran("one"), "nash_md"), last(ran("ddp"), "dpo")) > 1e-3


# ---- without processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "is_fsdp2", "words"),
    [("FSDP", False, "fsdp_version=2"), ("DEEPSPEED", False, "use accelerate with DDP, or with FSDP 2")],
)
def test_what_hides_the_weights_is_refused(kind, is_fsdp2, words):
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), is_fsdp2=is_fsdp2)
    with pytest.raises(ValueError, match=words):
        training_setup._check_accelerator(accelerator)


def test_a_whole_tensor_is_its_own_shard():
    x = torch.arange(3.0)
    assert full(x) is x
    assert like(torch.zeros(3), x) is x
