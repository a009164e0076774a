"""What the general tests, the tables, the bench and the grid need to know of each script: one row a script.

A script's name in tables is not here: it is what stands before the first colon of its docstring.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Script:
    family: str  # one of FAMILIES
    lines: int  # at most, its docstring included
    agent: bool = True  # it trains one; else tables of scores, bench and grid leave it out; its tests are its own
    discrete: bool = False  # its actions: then the general tests give it CartPole's data
    acts: bool = False  # while it learns: then its --steps are the environment's, and a seed is a process
    quick: dict = field(default_factory=dict)  # arguments that spare tests time, and use more of the code


# In the order in which they are read, here and in every table; so are the scripts of a family.
FAMILIES = ("imitation", "why offline fails", "policy constraint", "pessimism", "in-sample", "model-based", "sequence")
FAMILIES += ("generative", "offline-to-online", "evaluation", "preferences")
ASKS = {"env": "hopper-expert", "round_steps": 20, "eval_every": 20, "updates": 5}
GAIL = {"envs": 2, "horizon": 10, "eval_every": 20}
MODEL = {"rollouts": 40, "rollout_every": 5, "keep": 2, "model_updates": 20}
PHASES = {"offline_steps": 30, "eval_every": 100}
SCRIPTS = {
    "bc": Script("imitation", 175),
    "dagger": Script("imitation", 190, acts=True, quick=ASKS),
    "hg_dagger": Script("imitation", 190, acts=True, quick=ASKS),
    "safe_dagger": Script("imitation", 190, acts=True, quick=ASKS),
    "ensemble_dagger": Script("imitation", 190, acts=True, quick=ASKS),
    "bco": Script("imitation", 200, acts=True, quick=GAIL | {"pre_steps": 20, "buffer_size": 30, "updates": 3}),
    "gail": Script("imitation", 200, acts=True, quick=GAIL),
    "gaifo": Script("imitation", 200, acts=True, quick=GAIL),
    "apprenticeship": Script("imitation", 170, agent=False),
    "maxent_irl": Script("imitation", 190, agent=False),
    "airl": Script("imitation", 230, acts=True, quick=GAIL),
    "f_max": Script("imitation", 220, acts=True, quick=GAIL),
    "sac": Script("why offline fails", 200, acts=True, quick={"env": "hopper", "start_steps": 70, "eval_every": 100}),
    "offline_sac": Script("why offline fails", 195),
    "dqn": Script(
        "why offline fails",
        180,
        acts=True,
        quick={"env": "cartpole", "start_steps": 70, "epsilon_steps": 20, "eval_every": 100},
    ),
    "offline_dqn": Script("why offline fails", 150, discrete=True, quick={"target_every": 4}),
    "bcq": Script("policy constraint", 230, quick={"n_actions": 2}),
    "bear": Script("policy constraint", 270, quick={"warmup": 12, "n_actions": 2}),  # 10 lines of it are TUNED
    "awr": Script("policy constraint", 215, quick={"critic_steps": 4, "actor_steps": 7}),
    "awac": Script("policy constraint", 200),
    "td3_bc": Script("policy constraint", 190),
    "rebrac": Script("policy constraint", 225),  # 25 lines of it are TUNED
    "discrete_bcq": Script("policy constraint", 190, discrete=True, quick={"target_every": 4}),
    "cql": Script("pessimism", 260, quick={"n_actions": 2, "critic_layers": 1, "threshold": 5.0, "bc_steps": 5}),
    "discrete_cql": Script("pessimism", 180, discrete=True, quick={"target_every": 4, "quantiles": 3}),
    "sac_n": Script("pessimism", 210, quick={"n_critics": 4}),
    "edac": Script("pessimism", 220, quick={"n_critics": 4}),
    "iql": Script("in-sample", 200),
    "xql": Script("in-sample", 225),  # 20 lines of it are TUNED
    "sql": Script("in-sample", 215),
    "mopo": Script("model-based", 377, quick=MODEL),
    "morel": Script("model-based", 371, quick=MODEL),
    "combo": Script("model-based", 375, quick=MODEL | {"n_actions": 2}),
    "mbop": Script("model-based", 280, quick={"horizon": 2, "candidates": 2}),
    "dt": Script("sequence", 280, quick={"context": 5}),
    "tt": Script(
        "sequence",
        320,
        quick={"width": 8, "layers": 1, "context": 2, "bins": 5, "batch_size": 4, "beam": 2, "horizon": 2},
    ),
    "ad": Script("sequence", 280, agent=False),
    "diffuser": Script("generative", 310, quick={"width": 8, "levels": 2, "T": 3, "plans": 2, "horizon": 4}),
    "decision_diffuser": Script("generative", 320, quick={"width": 8, "levels": 2, "T": 3, "horizon": 4}),
    "idql": Script("generative", 245, quick={"n_samples": 3}),
    "fql": Script("generative", 230, quick={"width": 32, "flow_steps": 3}),
    "iql_finetune": Script("offline-to-online", 200, acts=True, quick=PHASES),
    "awac_finetune": Script("offline-to-online", 195, acts=True, quick=PHASES),
    "cal_ql": Script("offline-to-online", 300, acts=True, quick={"n_actions": 2, "critic_layers": 1} | PHASES),
    "rlpd": Script(
        "offline-to-online", 240, acts=True, quick={"start_steps": 70, "eval_every": 100, "utd": 2, "n_critics": 3}
    ),
    "spot": Script("offline-to-online", 280, acts=True, quick={"vae_steps": 15} | PHASES),
    "off2on": Script(
        "offline-to-online",
        350,
        acts=True,
        quick={"n_actions": 2, "critic_layers": 1, "members": 2, "start_steps": 20, "buffer_size": 300} | PHASES,
    ),
    "fqe": Script("evaluation", 190, agent=False),
    "importance_sampling": Script("evaluation", 200, agent=False),
    "doubly_robust": Script("evaluation", 230, agent=False),
    "rlhf": Script("preferences", 320, acts=True, agent=False),
    "dpo": Script("preferences", 245, agent=False),
}
# Those with an Actor, a Run and its records: what can be resumed, evaluated, timed.
TRAINED = {name: script for name, script in SCRIPTS.items() if script.agent}
