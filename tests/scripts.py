"""What the general tests, the tables, the bench and the grid need to know of each script: one row a script.

A script's name in tables is not here: it is what stands before the first colon of its docstring.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Script:
    family: str  # one of FAMILIES
    lines: int  # at most, its docstring included
    acts: bool = False  # while it learns: then its --steps are the environment's, and a seed is a process
    quick: dict = field(default_factory=dict)  # arguments that spare tests time, and use more of the code


# In the order in which they are read, here and in every table; so are the scripts of a family.
FAMILIES = ("imitation", "why offline fails", "policy constraint", "pessimism", "in-sample", "model-based", "sequence")
FAMILIES += ("generative", "offline-to-online", "evaluation", "preferences")
SCRIPTS = {
    "bc": Script("imitation", 150),
    "gail": Script("imitation", 200, acts=True, quick={"envs": 2, "horizon": 10, "eval_every": 20}),
    "sac": Script("why offline fails", 200, acts=True, quick={"env": "hopper", "start_steps": 70, "eval_every": 100}),
    "offline_sac": Script("why offline fails", 195),
    "bcq": Script("policy constraint", 230, quick={"n_actions": 2}),
    "bear": Script("policy constraint", 270, quick={"warmup": 12, "n_actions": 2}),  # 10 lines of it are TUNED
    "awr": Script("policy constraint", 215, quick={"critic_steps": 4, "actor_steps": 7}),
    "awac": Script("policy constraint", 200),
    "td3_bc": Script("policy constraint", 190),
    "rebrac": Script("policy constraint", 225),  # 25 lines of it are TUNED
    "cql": Script("pessimism", 260, quick={"n_actions": 2, "critic_layers": 1, "threshold": 5.0, "bc_steps": 5}),
    "sac_n": Script("pessimism", 210, quick={"n_critics": 4}),
    "edac": Script("pessimism", 220, quick={"n_critics": 4}),
    "iql": Script("in-sample", 200),
    "xql": Script("in-sample", 225),  # 20 lines of it are TUNED
    "sql": Script("in-sample", 215),
    "mopo": Script("model-based", 374, quick={"rollouts": 40, "rollout_every": 5, "keep": 2, "model_updates": 20}),
    "dt": Script("sequence", 280, quick={"context": 5}),
}
