"""Which state a run continues from, and whether this configuration may continue it."""

from collections.abc import Mapping
from pathlib import Path

from latentddae.core import config as configuration
from latentddae.core import dist, files
from latentddae.core.errors import ConfigError, DataError
from latentddae.training import crash_loops, states
from latentddae.training.config import is_safe_to_change
from latentddae.training.process import RunContext
from latentddae.training.states import State


def find_state(context: RunContext, contract: Mapping[str, object]) -> State | None:
    """The newest intact state of the run, or None for a new run (a collective).

    Raises DataError if all states of the run are damaged, ConfigError if it has lost them or was
    trained under another contract.
    """
    state, faults = states.newest_intact(context.run / "state", context.world)
    for fault in faults.values() if state else ():
        context.say(f"warning: {fault}; using an older state")
    _check(context.run, state, faults, contract)
    return state


@dist.rank0
def _check(
    run: Path, state: State | None, faults: Mapping[Path, str], contract: Mapping[str, object]
) -> None:
    if state is None:
        started = files.read_json_lines(run / "metrics.jsonl")
        if faults:
            raise DataError(
                f"{run} has no intact state: {next(iter(faults.values()))}; nothing was changed"
            )
        if started and not crash_loops.has_never_saved(run):
            raise ConfigError(
                f"{run} holds a run but no intact state in {run / 'state'}; "
                "choose another run folder or delete this one"
            )
        return
    changes = configuration.differences(state.info["contract"], contract)
    for key, (old, new) in changes.items():
        if not is_safe_to_change(key):
            raise ConfigError(
                f"{run} was trained with {key}={old!r}, now {new!r}; "
                "use another run folder or put the old value back; a new run continues from here "
                f"with other settings by branch={run}@{state.images}"
            )
    for path in faults:
        states.set_aside(path)
