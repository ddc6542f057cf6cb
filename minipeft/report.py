"""What a person sees of a result: the table at the end of a run, and the plot of who gained.

Everything here reads the result object that a suite writes as JSON; nothing is computed that is not in it.
"""

import sys
from pathlib import Path

import numpy as np


def table(result: dict) -> str:
    """The figures of suite `quick` for a person at a terminal."""
    accuracy, active = result["accuracy"], result["active"]
    lines = [
        "",
        f"{'training':<28}{'users/s':>10}{'tokens/s':>12}{'seconds':>10}{'passes':>9}",
        *(
            f"{name:<28}{part['users_per_s']:>10.2f}{part['tokens_per_s']:>12,.0f}{part['seconds']:>10.1f}"
            f"{part['passes']:>9,}"
            for name, part in (("whole plans, together", result["training"]), ("trial, together", result["fused"]),
                               ("trial, one by one", result["one_by_one"]))
        ),
        f"together is {result['speedup']:.2f}x as fast as one by one in the same engine "
        f"(trial: the same {result['num_users']} users and {result['trial_steps']} steps)",
        f"peak memory {result['peak_memory_mb']:.0f} MB",
        "",
        f"{'accuracy %, mean over users':<28}{'all users':>10}{'95 % interval':>18}"
        + (f"{'>= ' + str(active['at_least']) + ' examples':>18}" if active else ""),
    ]
    names = {"own_majority": "own majority", "base": "one model for all (base)", "shared": "one shared LoRA",
             "personal": "personal LoRA", "ceiling_shared": "best of any shared model",
             "logistic_on_features": "logistic, true features", "ceiling_personal": "best of any personal one"}
    for key, name in names.items():
        if accuracy[key] is not None:
            bounds = accuracy["ci"].get(key)
            between = f"{bounds[0]:.1f} to {bounds[1]:.1f}" if bounds else ""
            lines.append(f"{name:<28}{accuracy[key]:>10.1f}{between:>18}"
                         + (f"{active[key]:>18.1f}" if active else ""))
    low, high = accuracy["personal_minus_shared"]
    lines.append(f"personal minus shared: {accuracy['personal'] - accuracy['shared']:+.1f} points "
                 f"(paired 95 % interval {low:+.1f} to {high:+.1f}); "
                 f"{accuracy['users_who_gain']} users gain, {accuracy['users_who_lose']} lose")
    if result["skipped_steps"]:
        lines.append("steps skipped because a gradient was not finite: "
                     + ", ".join(f"{user} {steps}" for user, steps in result["skipped_steps"].items()))
    if accuracy["ceiling_shared"] is not None:
        way = [f"{100 * way_to_ceiling(part):.0f} % {who}" for part, who in
               ((accuracy, "over all users"), (active, f"over the {active['num_users']} active ones" if active else ""))
               if part]
        lines.append(f"way from the shared ceiling to the personal one: {', '.join(way)}")
        lines.append("(\"best of\" is in expectation; on the texts drawn for testing a model can pass it)")
    independence = result["independence"]
    lines += [
        "",
        f"together = alone: largest relative difference of an adapter {independence['max_relative_difference']:.1e}",
        "one user's examples rewritten: "
        + {True: "everybody else bit-identical", False: "everybody else CHANGED", None: "there is nobody else"}[
            independence["bitwise_isolated"]],
        f"{result['seconds']:.0f} s in all",
    ]
    return "\n".join(lines)


def way_to_ceiling(accuracy: dict) -> float:
    """0 at the best shared model, 1 at the best personal one."""
    span = accuracy["ceiling_personal"] - accuracy["ceiling_shared"]
    return (accuracy["personal"] - accuracy["ceiling_shared"]) / span if span else float("nan")


def plot_gains(path: Path, gains: np.ndarray, result: dict) -> None:
    """One bar per user: personal minus shared accuracy, sorted."""
    try:
        import matplotlib
    except ImportError:
        print("no gains.png: matplotlib is not installed (pip install 'minipeft[report]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    gains = np.sort(gains)[::-1]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.bar(np.arange(1, len(gains) + 1), gains, width=1.0, color=np.where(gains >= 0, "#0072b2", "#d55e00"))
    axes.axhline(0, color="black", linewidth=0.8)
    mean = gains.mean()
    who = f"{np.mean(gains > 0):.0%} of {len(gains)} users gain, {np.mean(gains < 0):.0%} lose"
    axes.axhline(mean, color="black", linewidth=0.8, linestyle="--", label=f"mean {mean:+.1f} points")
    axes.set(xlabel="users, sorted by gain", ylabel="personal minus shared accuracy, points",
             title=f"{result['task']}: {who}",
             xlim=(0.4, len(gains) + 0.6))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
