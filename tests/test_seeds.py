"""Agents trained side by side are independent, and what makes them fast changes no number."""

import contextlib
import dataclasses
import json
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, children, start, wait_for_the_end, wait_until
from test_scripts import FROM_DATA, MODULES, SEEDED, arguments, assert_equal, checkpoint_of, trained

from algorithms import bc, td3_bc
from datasets import Batch, Dataset, UserError, find_task, vector_env
from results.run import Run


def learned(state):
    """{name: tensor} of what a checkpoint's `state` holds, less the optimisers."""
    items = {name: item for name, item in state.items() if not name.endswith("opt")}
    items = {name: {"": item} if isinstance(item, torch.Tensor) else item for name, item in items.items()}
    return {f"{name}.{key}": value for name, item in items.items() for key, value in item.items()}


def state_of(run):
    """{name: tensor} of everything that a run learns."""
    state = {name: item if isinstance(item, torch.Tensor) else item.state_dict() for name, item in run.state.items()}
    return learned(state)


def has_its_own(name, test):
    path = ROOT / "tests" / f"test_{'mopo' if name in ('morel', 'combo') else name}.py"  # its sisters are tested there
    return path.exists() and f"def {test}(" in path.read_text()


@pytest.mark.parametrize("name", [name for name in SEEDED if not has_its_own(name, "test_seeds_do_not_leak")])
def test_seeds_do_not_leak(name, small, monkeypatch, request):
    """Agent k of 3, and agent k alone with its parameters, batches and noise: equal to 1e-9 after 20 updates. A test
    of this name in the script's own file stands for this one."""
    script, starts, batches, ends = MODULES[name], [], [], []
    stack, load = script.stack, script.load
    source, sampler = (script, "sample_sequences") if hasattr(script, "sample_sequences") else (Dataset, "sample")
    sample = getattr(source, sampler)

    def load_double(*words, **options):
        data = load(*words, **options)
        data.rows = data.rows.double()
        return data

    def keep_starts(nets):
        starts.append([net.double().state_dict() for net in nets])
        return stack(nets)

    def keep_batches(*words):
        batches.append(sample(*words))
        return batches[-1]

    monkeypatch.setattr(script, "load", load_double)
    monkeypatch.setattr(script, "stack", keep_starts)
    monkeypatch.setattr(source, sampler, keep_batches)
    monkeypatch.setattr(Dataset, "evaluate", lambda self, _, episodes, seed, seeds, **_k: np.zeros((seeds, episodes)))
    for noise in ("randn_like", "rand_like"):  # each agent's own, by its batch; steeper, it would blow rounding up
        monkeypatch.setattr(torch, noise, torch.sin)
    monkeypatch.setattr(Run, "_save", lambda run: ends.append(state_of(run)))
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)  # also of what is not in a network: log_alpha
    no_dropout = {"dropout": 0.0} if hasattr(script.Args, "dropout") else {}
    args = arguments(script, small, steps=20, eval_every=20, batch_size=8, **no_dropout)
    script.train(dataclasses.replace(args, seeds=3))
    together, starts_together, batches_together = ends.pop(), list(starts), list(batches)
    assert len(batches_together) == 20 and batches_together[0].act.shape[:2] == (3, 8)
    assert not torch.equal(batches_together[0].obs[0], batches_together[0].obs[1])
    for agent in range(3):
        own_starts = [states[agent] for states in starts_together]
        own_batches = [type(batch)(*(column[agent] for column in batch)) for batch in batches_together]

        def load_starts(nets, own_starts=own_starts):
            nets[0].double().load_state_dict(own_starts.pop(0))
            return nets[0]

        monkeypatch.setattr(script, "stack", load_starts)
        monkeypatch.setattr(source, sampler, lambda *words, own_batches=own_batches: own_batches.pop(0))
        script.train(args)
        alone = ends.pop()
        assert alone
        for name, value in alone.items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(
                together[name][agent], value.view_as(together[name][agent]), rtol=1e-9, atol=1e-15
            )


def test_agents_differ():
    """Same parameters, same batch: the noise of target actions is still each agent's own."""
    nets = [stacked(make) for make in (td3_bc.Critic, td3_bc.Critic, td3_bc.Actor)]
    losses = td3_bc.lift(2, lambda *words: td3_bc.critic_loss(td3_bc.Args(), *words), *nets)
    one = Batch(torch.randn(8, 17), torch.rand(8, 6), torch.randn(8), torch.randn(8, 17), torch.zeros(8))
    first, second = losses(Batch(*(torch.stack([column, column]) for column in one)))
    assert first != second


def stacked(make):
    torch.manual_seed(0)
    net = make(17, 6)
    return td3_bc.stack([net, net])


def test_stacked_policy_acts_as_each_agent():
    actors = [bc.Actor(17, 6) for _ in range(3)]
    obs = torch.randn(3, 5, 17)
    expected = torch.stack([actor(o) for actor, o in zip(actors, obs)]).detach()
    actor = bc.stack(actors)
    torch.testing.assert_close(bc.lift(3, bc.policy, actor)(obs).detach(), expected)


def test_one_record_for_each_seed(small, tmp_path, monkeypatch):
    """--record files each agent under its own seed, in the cell of runs of one agent."""
    monkeypatch.setattr("results.run.ROOT", tmp_path)
    bc.train(arguments(bc, small, steps=20, seed=5, seeds=2, lr=1e-3, record=True))
    bc.train(arguments(bc, small, steps=20, seed=7, lr=1e-3, record=True))
    folder = tmp_path / "results/runs/bc/collected/hopper-medium"
    names = [f"seed={seed},lr=0.001,eval_every=10,eval_episodes=1,steps=20.json" for seed in (5, 6, 7)]
    assert sorted(path.name for path in folder.iterdir()) == names
    five, six, seven = (json.loads((folder / name).read_text()) for name in names)
    assert (five["seed"], six["seed"], six["trained_together"], seven["trained_together"]) == (5, 6, 2, 1)
    assert five["args"] == six["args"] == seven["args"]
    assert [point["step"] for point in six["curve"]] == [10, 20] and five["returns"] != six["returns"]
    assert six["score"] == six["curve"][-1]["score"] and six["returns"] == six["curve"][-1]["returns"]
    losses = [[point["losses"]["actor_loss"] for point in record["curve"]] for record in (five, six, seven)]
    assert losses[0] != losses[1] and all(last < first for first, last in losses)  # each seed's own


def test_not_finite_names_the_agent(small, monkeypatch):
    original, calls = bc.lift, []

    def lift(seeds, function, *nets):
        lifted = original(seeds, function, *nets)

        def poisoned(*inputs):
            calls.append(1)
            return lifted(*inputs) + torch.tensor([0.0, float("nan") if len(calls) == 4 else 0.0])

        return poisoned if function is bc.actor_loss else lifted

    monkeypatch.setattr(bc, "lift", lift)
    with pytest.raises(UserError, match="A loss of seed 4 stopped being finite at step 4; there is no checkpoint yet"):
        bc.train(arguments(bc, small, steps=10, seed=3, seeds=2))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_no_return(workers, monkeypatch):
    """Episodes of unequal length, 2 agents: the same returns, however many processes step the environments."""
    task = find_task("hopper-medium")
    weights = torch.randn(2, 11, 3, generator=torch.Generator().manual_seed(0))

    def returns():
        data = Dataset.buffer(task, 0)
        both = [data.evaluate(lambda obs: (obs @ weights).tanh(), 4, seed=5, seeds=2) for _ in range(2)]
        np.testing.assert_array_equal(*both)
        return both[0]

    alone = returns()
    assert len(np.unique(alone)) == alone.size == 8
    monkeypatch.setattr("datasets.dataset.make_envs", lambda task, n: vector_env.Workers(task, n, workers))
    np.testing.assert_array_equal(returns(), alone)


def test_number_of_workers(monkeypatch):
    made = []
    monkeypatch.setattr(vector_env, "Workers", lambda task, n, workers: made.append((n, workers)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    task = find_task("hopper-medium")
    assert len(vector_env.make_envs(task, 10).envs) == 10 and not made
    for n in (20, 400):
        vector_env.make_envs(task, n)
    assert made == [(20, 2), (400, 4)]


def test_dead_worker():
    workers = vector_env.Workers(find_task("hopper-medium"), 4, 2)
    workers.reset(np.arange(4))
    for pid in children(os.getpid()):
        os.kill(pid, 9)
    with pytest.raises(UserError, match="worker process of the environments died"):
        workers.step(np.zeros((4, 3)))


def test_workers_end_with_their_environments():
    """Also where others were forked after them, which live on."""
    before, task = set(children(os.getpid())), find_task("hopper-medium")
    first = vector_env.Workers(task, 4, 2)
    gone = set(children(os.getpid())) - before
    second = vector_env.Workers(task, 4, 2)
    assert len(gone) == 2
    del first
    deadline = time.time() + 10
    while gone & set(children(os.getpid())):
        assert time.time() < deadline
        time.sleep(0.01)
    assert second.reset(np.arange(4)).shape == (4, 11)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs 2 cores")
def test_no_worker_is_left(small, tmp_path):
    """kill -9 of a run takes its workers along."""
    words = ["--env", small, "--steps", 10**6, "--eval-every", 20, "--eval-episodes", 10, "--seeds", 2]
    process = start("algorithms/bc.py", *words)
    wait_until(lambda: len(children(process.pid)) == 2, process)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    wait_for_the_end(workers, seconds=10)


def test_graphs_are_captured_once_for_each_key(monkeypatch):
    """Three calls of each key as they are, then one capture, then replays."""
    events = []
    run = SimpleNamespace(device=torch.device("cuda"), args=SimpleNamespace(graph=True))
    fake = lambda: SimpleNamespace(replay=lambda: events.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext(events.append("capture")))
    update = Run.graphed(run, events.append)
    for step in range(1, 13):
        update(step % 2 == 0)
    assert events[:6] == [False, True] * 3
    assert events[6:] == ["capture", False, "replay", "capture", True, "replay"] + ["replay"] * 4
    run.args.graph = False
    assert Run.graphed(run, print) is print


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name, seeds", [(name, n) for name in FROM_DATA for n in ((1, 3) if name in SEEDED else (1,))])
def test_graph_changes_nothing(name, seeds, small, tmp_path, monkeypatch):
    """50 updates with and without the graph: the same parameters up to float error."""
    script = MODULES[name]
    args = arguments(script, small, steps=50, eval_every=50, device="cuda", batch_size=64)
    args = dataclasses.replace(args, seeds=seeds) if seeds > 1 else args
    plain = trained(tmp_path, monkeypatch, "plain", (script.train, dataclasses.replace(args, graph=False)))
    graph = trained(tmp_path, monkeypatch, "graph", (script.train, args))
    plain, graph = learned(plain["state"]), learned(graph["state"])
    for name, value in plain.items():
        torch.testing.assert_close(graph[name], value, rtol=1e-3, atol=1e-4)


def test_graph_flag_on_cpu(small, tmp_path, monkeypatch):
    """On a CPU --no-graph is the same run, in the same folder."""
    args = arguments(bc, small, steps=10)
    plain = trained(tmp_path, monkeypatch, "plain", (bc.train, dataclasses.replace(args, graph=False)))
    graph = trained(tmp_path, monkeypatch, "graph", (bc.train, args))
    assert_equal(plain["state"], graph["state"])
    paths = [checkpoint_of(tmp_path / name).relative_to(tmp_path / name) for name in ("plain", "graph")]
    assert paths[0] == paths[1]
