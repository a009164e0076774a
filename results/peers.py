"""Updates per second of TD3+BC here, in d3rlpy, in torchrl, of IQL, CQL and FQE here and in d3rlpy; environment steps
per second of GAIL, AIRL and DAgger here and in imitation, gradient steps of MaxEnt IRL: make bench-peers.

Each candidate is a process of its own with the same data (halfcheetah-medium), batch size, widths and device, and all
threads for itself: they take turns, one round after another, so that a machine whose speed drifts slows all alike.
An update draws its batch and makes one step of the critic, TD3+BC's every second one a step of actor and targets,
IQL's and CQL's every one; CQL samples 30 actions for each state in either library. GAIL acts in Hopper, in an iteration
8,000 steps in 8 environments, followed by 30 updates of the discriminator and 10 epochs of PPO, all on batches of 256.
AIRL does the same, and beside GAIL run its sisters here. FQE values one policy, TD3+BC's as it is initialised. DAgger
asks the same expert, in rounds of 1,000 steps (imitation's end with an episode, and count as long as they were), and
makes 1,000 updates after each. MaxEnt IRL fits the same soft expert of the gridworld `open` with Adam; after 3,000
steps of each the occupancies of both fitted policies are compared, and both rewards.

Usage: python results/peers.py --peers .venv-peers/bin/python td3_bc     (or iql, cql, fqe; on an idle machine)
       python results/peers.py --peers .venv-imitation/bin/python gail     (or airl, dagger, maxent_irl)
"""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
ROUNDS, SECONDS = 7, 3.0  # each round gives each candidate about so long
OURS = {"td3_bc": (1, 4, 16), "iql": (1, 4), "cql": (1, 4), "fqe": (1,)}  # seeds
PEERS = {"td3_bc": ("d3rlpy", "d3rlpy, one fixed batch", "torchrl"), "iql": ("d3rlpy",), "cql": ("d3rlpy",)}
PEERS |= {"fqe": ("d3rlpy",)} | dict.fromkeys(("gail", "airl", "dagger", "maxent_irl"), ("imitation",))
SISTERS = {"gail": ("gaifo", "airl", "f_max")}  # that run beside it
TASKS = dict.fromkeys(("gail", "gaifo", "airl", "f_max", "dagger"), "hopper-expert")  # the others': halfcheetah-medium
STRIDE = {"gail": 8000, "airl": 8000, "gaifo": 8000, "f_max": 8000, "dagger": 1000}  # steps in what is called an update
FITTED, CONVERGED = 500, 3000  # gradient steps of MaxEnt IRL that are timed; after which the results are compared


def commands():
    """The numbers of updates that the parent asks for, one a line."""
    print("ready", flush=True)
    for line in sys.stdin:
        yield int(line)


def timed(update, n):
    start = time.perf_counter()
    for _ in range(n):
        update()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print("seconds", time.perf_counter() - start, flush=True)


def run_ours(script, seeds):
    """Trains with the script itself; its loop stops between the rounds."""
    module = importlib.import_module(script)
    steps = module.Run.steps

    def paused(run, data, **state):
        loop = steps(run, data, **state)
        for n in commands():
            start = time.perf_counter()
            for _ in range(n):
                yield next(loop)
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            print("seconds", time.perf_counter() - start, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["RUNS_DIR"] = folder
        env = TASKS.get(script, "halfcheetah-medium")
        more = {} if script == "dagger" else {"source": "collected"}
        if script not in STRIDE:
            more["seeds"] = seeds
        if script == "fqe":
            more = {"source": "collected", "policies": (first_checkpoint(env),)}
        module.Run.steps = paused
        module.train(module.Args(env=env, steps=8 * 10**8, eval_every=8 * 10**8, **more))


def run_our_maxent_irl(path):
    """Each time from the beginning on: the script has no loop to stop in."""
    import maxent_irl

    for n in commands():
        start = time.perf_counter()
        found = maxent_irl.train(maxent_irl.Args(steps=n))
        print("seconds", time.perf_counter() - start, flush=True)
        np.save(path.with_name("ours.npy"), found["rew"].numpy())


def write_world(path):
    """The world and the soft expert of maxent_irl.py, as arrays; its visits are of all T + 1 states of an episode, as
    imitation counts them."""
    import maxent_irl

    args = maxent_irl.Args()
    world = maxent_irl.find_world(args.env, args.features, args.wind, args.gamma, args.horizon)
    policy, _ = maxent_irl.soft_policy(world, args.beta * world.rew)
    longer = torch.cat([policy, policy[-1:]])
    arrays = {name: getattr(world, name).numpy() for name in ("move", "start", "rew", "features")}
    np.savez(path, **arrays, visits=world.visits(longer).sum(0).numpy(), gamma=args.gamma, horizon=args.horizon)


def compare_rewards(folder):
    """By how much the occupancies of the policies that the two rewards make differ, as a share of all, and the
    correlation of the rewards."""
    import maxent_irl

    args = maxent_irl.Args()
    world = maxent_irl.find_world(args.env, args.features, args.wind, args.gamma, args.horizon)
    ours, theirs = (torch.from_numpy(np.load(folder / f"{name}.npy")).double() for name in ("ours", "imitation"))
    visits = [world.visits(maxent_irl.soft_policy(world, rew)[0]).sum(0) for rew in (ours, theirs)]
    apart = (visits[0] - visits[1]).abs().sum() / visits[0].sum() / 2
    return apart.item(), maxent_irl.correlation(ours, theirs)


def first_checkpoint(env):
    """Of td3_bc.py after one update."""
    import td3_bc

    td3_bc.train(td3_bc.Args(env=env, source="collected", steps=1, eval_episodes=1))
    return str(next(Path(os.environ["RUNS_DIR"]).rglob("checkpoint.pt")))


def columns(path):
    import h5py

    with h5py.File(path) as file:
        return [file[name][:] for name in ("observations", "actions", "rewards", "terminals", "timeouts")]


def run_d3rlpy(script, path, fixed):
    import d3rlpy

    obs, act, rew, terminals, timeouts = columns(path)
    data = d3rlpy.dataset.MDPDataset(obs, act, rew, terminals.astype(np.float32), timeouts.astype(np.float32))
    scaler = d3rlpy.preprocessing.StandardObservationScaler(obs.mean(0), obs.std(0))
    config = d3rlpy.algos.TD3PlusBCConfig(batch_size=256, observation_scaler=scaler)
    if script == "iql":
        config = d3rlpy.algos.IQLConfig(batch_size=256)
    if script == "cql":  # as in d3rlpy's own reproduction
        width = d3rlpy.models.VectorEncoderFactory([256, 256, 256])
        words = dict(actor_encoder_factory=width, critic_encoder_factory=width, alpha_learning_rate=0.0)
        config = d3rlpy.algos.CQLConfig(batch_size=256, observation_scaler=scaler, n_action_samples=10, **words)
    device = "cuda:0" if torch.cuda.is_available() else "cpu:0"
    agent = config.create(device=device)
    agent.build_with_dataset(data)
    if script == "fqe":
        agent = d3rlpy.ope.FQE(agent, d3rlpy.ope.FQEConfig(batch_size=256), device=device)
        agent.build_with_dataset(data)
    batch = data.sample_transition_batch(256)
    for n in commands():
        timed(lambda: agent.update(batch if fixed else data.sample_transition_batch(256)), n)


def run_torchrl(path):
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.modules import MLP, TanhModule, ValueOperator
    from torchrl.objectives import SoftUpdate, TD3BCLoss

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obs, act, rew, terminals, timeouts = map(torch.as_tensor, columns(path))
    obs = (obs - obs.mean(0)) / (obs.std(0) + 1e-3)
    N = len(obs) - 1
    flags = {"terminated": terminals[:N, None].bool(), "done": (terminals | timeouts)[:N, None].bool()}
    # Here alone, for the time it takes: the row after a time-out stands for its next observation.
    next_td = {"observation": obs[1:], "reward": rew[:N, None], **flags}
    table = TensorDict({"observation": obs[:-1], "action": act[:N], "next": next_td}, [N], device=device)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(N, device=device), batch_size=256)
    buffer.extend(table)

    spec = Bounded(-1, 1, (act.shape[1],), device=device)
    mlp = lambda i, o: MLP(i, o, num_cells=[256, 256], activation_class=torch.nn.ReLU, device=device)
    actor = TensorDictSequential(
        TensorDictModule(mlp(obs.shape[1], act.shape[1]), ["observation"], ["param"]),
        TanhModule(["param"], ["action"], spec=spec),
    )
    value = ValueOperator(mlp(obs.shape[1] + act.shape[1], 1), in_keys=["action", "observation"])
    loss = TD3BCLoss(actor, value, action_spec=spec, num_qvalue_nets=2, loss_function="l2", delay_qvalue=True)
    loss.make_value_estimator(gamma=0.99)
    targets = SoftUpdate(loss, eps=0.995)
    critic_opt = torch.optim.Adam(list(loss.qvalue_network_params.flatten_keys().values()), 3e-4)
    actor_opt = torch.optim.Adam(list(loss.actor_network_params.flatten_keys().values()), 3e-4)
    count = 0

    def update():
        nonlocal count
        batch = buffer.sample()
        critic_opt.zero_grad()
        loss.qvalue_loss(batch)[0].backward()
        critic_opt.step()
        count += 1
        if count % 2 == 0:
            actor_opt.zero_grad()
            loss.actor_loss(batch)[0].backward()
            actor_opt.step()
            targets.step()

    for n in commands():
        timed(update, n)


class Candidate:
    """A process that updates when it is asked to."""

    def __init__(self, python, script, name, path, agents):
        self.name, self.agents, self.rates = name, agents, []
        command = [python, __file__, "--candidate", script, name, str(path), str(agents)]
        log = Path(tempfile.gettempdir()) / f"peers-{script}-{name.replace(' ', '-')}-{agents}.log"
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, bufsize=1
            )
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit(f"error: {name} did not start; its messages are in {log}.")
        self.stride = STRIDE.get(script, 1)
        self.ask(20 if self.stride == 1 else 1)  # sets everything up
        self.updates = 1 if self.stride > 1 else max(10, int(SECONDS * 50 / self.ask(50)))
        self.updates = FITTED if script == "maxent_irl" else self.updates  # as many as its Args have

    def ask(self, n):
        self.process.stdin.write(f"{n}\n")
        while not (line := self.process.stdout.readline()).startswith("seconds "):  # libraries print as they train
            if not line:
                raise SystemExit(f"error: {self.name} stopped.")
        return float(line.split()[1])

    def round(self):
        self.rates.append(self.agents * self.stride * self.updates / self.ask(self.updates))


def compare(peers, script):
    """Rows (name, median agent-updates/s, median over the rounds of the ratio to each peer)."""
    from datasets import find_task, load
    from datasets.collect import collected_file, plan
    from results.bench import append, machine

    folder = Path(tempfile.mkdtemp())
    if script == "maxent_irl":
        write_world(path := folder / "world.npz")
    elif script == "dagger":
        ((path, *_), *_) = plan(find_task(TASKS[script]))  # who collects the task's data
    else:
        task = TASKS.get(script, "halfcheetah-medium")
        load(task, "collected")  # collects the file where it is not there yet
        path = collected_file(find_task(task))
    everyone = [Candidate(sys.executable, script, "ours", path, seeds) for seeds in OURS.get(script, (1,))]
    everyone += [Candidate(sys.executable, sister, f"ours, {sister}", path, 1) for sister in SISTERS.get(script, ())]
    everyone += [Candidate(peers, script, name, path, 1) for name in PEERS[script]]
    for _ in range(ROUNDS):
        for candidate in everyone:
            candidate.round()
    rows = []
    for one in everyone:
        row = {"name": one.name, "seeds": one.agents, "agent_updates_per_s": round(np.median(one.rates))}
        for peer in everyone:
            if peer.name in PEERS[script] or (script in SISTERS and peer.name == "ours"):
                row[peer.name] = np.median(np.divide(one.rates, peer.rates)).round(2)
        rows.append(row)
        print(", ".join(f"{key}: {value}" for key, value in rows[-1].items()))
    where = machine("cuda" if torch.cuda.is_available() else "cpu")
    entry = {"kind": "peers", "script": script, **where, "rows": rows}
    if script == "maxent_irl":
        for candidate in everyone:
            candidate.ask(CONVERGED)
        entry["apart"], entry["correlation"] = (round(x, 5) for x in compare_rewards(folder))
        print(f"occupancies differ by {entry['apart']:.2%}; correlation of the rewards {entry['correlation']:.4f}")
    append(entry)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--candidate"]:
        script, name, path, agents = sys.argv[2:]
        if name.startswith("ours"):
            run_our_maxent_irl(Path(path)) if script == "maxent_irl" else run_ours(script, int(agents))
        elif name == "torchrl":
            run_torchrl(path)
        elif name == "imitation":
            import peers_imitation  # beside this file

            peers_imitation.run(script, Path(path))
        else:
            run_d3rlpy(script, path, fixed=name != "d3rlpy")
    elif sys.argv[1:2] == ["--peers"] and len(sys.argv) == 4 and sys.argv[3] in PEERS:
        compare(*sys.argv[2:])
    else:
        raise SystemExit(__doc__)
