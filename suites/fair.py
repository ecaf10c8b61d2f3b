"""The fair fight: as many trials for every arm, then the best of each on fresh seeds, by tokens and by time.

    SUITES["fair-trials"].plan(scale, winners); SUITES["fair-fight"].plan(scale, winners)

The first arm is the reference. The fight repeats no document, so `everything` skips both suites.
"""

from collections.abc import Mapping
from dataclasses import replace

from engine.cli import BadInput
from engine.own_optimizer import is_own
from suites.arms import ARMS, draw, own_arm
from suites.scales import Fight, Scale
from suites.suite import OURS, Condition, Winners, suite

TRIALS, FIGHT = "fair-trials", "fair-fight"
EQUAL_TOKENS, EQUAL_TIME = "equal tokens", "equal time"
VALIDATIONS = 16  # of a run of the fight, so that the time to a loss is read from a curve


@suite(
    TRIALS,
    "How low does each optimizer get, with how many trials?",
    source=OURS,
    varies="trial",
    claimed=False,
    one_seed=True,
)
def fair_trials(scale: Scale, winners: Winners) -> list[Condition]:
    fight = scale.fight
    base = {**fight.fields, **fight.budget(fight.steps, validations=1)}
    drawn = {arm.name: draw(arm, fight.trials) for arm in fight.arms}
    return [  # arms in turns, so that a machine that slows down does so for all
        Condition(f"{arm.name} {i + 1:02d}", {**base, **drawn[arm.name][i]}, arm=arm.name, space=arm.space)
        for i in range(fight.trials)
        for arm in fight.arms
    ]


@suite(
    FIGHT,
    "Who wins after equal tuning: at equal tokens, in equal time, and to a fixed loss?",
    source=OURS,
    varies="arm",
    claimed=False,
    confirms=True,
    needs=(TRIALS,),
)
def fair_fight(scale: Scale, winners: Winners) -> list[Condition]:
    """Equal tokens; when these are over, equal time by their speeds, unless no run of some arm has finished."""
    fight = scale.fight
    first = fight.arms[0].name

    def conditions(way: str, steps_of: Mapping[str, int]) -> list[Condition]:
        budgets = {name: fight.budget(steps, VALIDATIONS) for name, steps in steps_of.items()}
        return [
            Condition(
                f"{arm.name}, {way}",
                {**fight.fields, **arm.fixed, **winners(TRIALS, arm.name), **budgets[arm.name]},
                None if arm.name == first else f"{first}, {way}",
                arm.name,
                arm.space,
            )
            for arm in fight.arms
        ]

    tokens = conditions(EQUAL_TOKENS, {arm.name: fight.steps for arm in fight.arms})
    speeds = winners.seconds_per_token(FIGHT, tokens)
    if len(speeds) < len(fight.arms):
        return tokens
    return tokens + conditions(EQUAL_TIME, equal_time(fight.steps, speeds))


def equal_time(steps: int, seconds_per_token: Mapping[str, float]) -> dict[str, int]:
    """Steps of each arm that take as long as `steps` of the slowest one. Schedules are shares of the steps, so each
    arm's ends when the time is over."""
    slowest = max(seconds_per_token.values())
    return {arm: round(steps * slowest / seconds) for arm, seconds in seconds_per_token.items()}


def chosen_fight(
    fight: Fight,
    arms: tuple[str, ...] | None = None,
    space: tuple[str, ...] | None = None,
    trials: int | None = None,
    steps: int | None = None,
) -> Fight:
    """A fight with the arms, the space of a user's own arms, trials and steps of the flags; BadInput where there is no
    such fight."""
    if space is not None and not any(map(is_own, arms or ())):
        raise BadInput(f"--space {' '.join(space)}: for an optimizer of your own, FILE.py:CLASS in --arms")
    if arms is not None:
        if unknown := [arm for arm in arms if arm not in ARMS and not is_own(arm)]:
            raise BadInput(f"--arms {unknown[0]}: no such arm; choose from {', '.join(ARMS)} or FILE.py:CLASS")
        chosen = tuple(own_arm(arm, space or ()) if is_own(arm) else ARMS[arm] for arm in arms)
        if len({arm.name for arm in chosen}) < max(2, len(chosen)):
            raise BadInput(f"--arms {' '.join(arms)}: name two or more, each once")
        fight = replace(fight, arms=chosen)
    if trials is not None:
        fight = replace(fight, trials=trials)
    return fight if steps is None else replace(fight, fields={**fight.fields, **fight.budget(steps)})
