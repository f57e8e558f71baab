# %% [markdown]
# # Did perplexity tell the truth?
#
# A notebook over the tables of one model, to look closer and to ask further. It lies beside them and reads nothing
# else, so it can be run again, changed, and moved with its folder. What each column means stands in
# `bitalloc/tables/`.

# %%
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown, display

from bitalloc.figures.style import mark
from bitalloc.statistics import accuracies, spearman
from bitalloc.tables import EVALUATE, GATES, GOODHART, PLANS

pd.set_option("display.precision", 3, "display.max_rows", 200)
folder = Path()
plans = PLANS.read(folder / "plans.parquet")
evaluate = EVALUATE.read(folder / "evaluate.parquet")
goodhart = GOODHART.read(folder / "goodhart.parquet")
gates = GATES.read(folder / "gates.parquet")

# %% [markdown]
# ## What all of it stands on
#
# A check that does not say GO bears on everything below.

# %%
gates[["gate", "check", "value", "comparison", "threshold", "go", "mode", "why"]]

# %% [markdown]
# ## The plans: one proxy, several golds
#
# `corpus` is the text that perplexity is told on, `gold` what one cares about: right answers where tasks were run, else
# the share of tokens at which a plan's first choice is that of the unquantised model. Change either and run on.

# %%
report = evaluate[~evaluate["task"].str.endswith("/select")]
corpus = report.loc[report["metric"] == "ppl", "task"].iloc[0]
right = accuracies(report)
gold = right if len(right) else report[report["metric"] == "top1"]
scores = gold.pivot(index="plan", columns="task", values="value").mul(100)
proxy = report[(report["metric"] == "ppl") & (report["task"] == corpus)].set_index("plan")["value"]
table = plans.set_index("plan")[["strategy", "budget", "bits_per_weight"]].join(proxy.rename("ppl")).join(scores)
table = table.dropna(subset="ppl")
print(f"{len(table)} plans, PPL on {corpus}, golds: {', '.join(scores.columns)}")
table[table["strategy"] != "random"]

# %% [markdown]
# ## At equal bytes: does lower perplexity go with more right answers?
#
# One row of panels a gold, one column a budget. Only plans of one column compare: bytes drive both axes, so that a
# correlation over all of them would say nothing.

# %%
budgets = list(table.groupby("budget")["bits_per_weight"].mean().sort_values().index)
figure, panels = plt.subplots(
    len(scores.columns), len(budgets), figsize=(3.2 * len(budgets), 2.2 * len(scores.columns)), squeeze=False,
    sharey="row", layout="constrained",
)  # fmt: skip
for (row, name), (column, budget) in product(enumerate(scores.columns), enumerate(budgets)):
    axes, part = panels[row][column], table[table["budget"] == budget]
    pool = part["strategy"] == "random"
    axes.scatter(part.loc[pool, "ppl"], part.loc[pool, name], s=12, color="0.7")
    for strategy, plan in part[~pool].groupby("strategy"):
        style = mark(strategy)
        axes.scatter(plan["ppl"], plan[name], s=24, label=style.label, marker=style.marker, color=style.colour)
    axes.set_title(budget if row == 0 else "", loc="left", size=9)
    axes.set_ylabel(f"{name}, %" if column == 0 else "", size=9)
panels[0][-1].legend(fontsize=6, loc="best")
_ = figure.supxlabel(f"PPL on {corpus}", size=9)
# %% [markdown]
# ## The rank correlations, with their intervals
#
# Spearman's rho within each budget, and its mean over the budgets (`all`). Negative: lower perplexity, more right
# answers. `status` says where nothing can be claimed: the unquantised model is at the floor, all plans equal it
# (saturated), or there are too few plans.

# %%
chosen = next((name for name in goodhart["proxy"] if name.startswith("nll:")), None)
rho = goodhart[(goodhart["statistic"] == "spearman") & (goodhart["proxy"] == chosen)]
rho.set_index(["gold", "budget"])[["value", "lo", "hi", "n", "status"]]

# %% [markdown]
# The same by hand, without intervals. A plan under two names counts once, as above.

# %%
once = plans.drop_duplicates(["budget", "nbytes", "objective"])["plan"]
by_hand = {
    (name, budget): float(spearman(part["ppl"].to_numpy()[None], part[name].to_numpy()[None])[0])
    for name in scores.columns
    for budget, part in table[table.index.isin(once)].dropna(subset=name).groupby("budget")
}
pd.Series(by_hand).unstack()

# %% [markdown]
# ## What choosing by each rule costs
#
# Points of the gold lost against the plan that is best on the other half of the items. Near 0 the rule is as good as
# having asked; `random` is a plan drawn from the pool.

# %%
regret = goodhart[(goodhart["statistic"] == "regret_points") & (goodhart["budget"] == "all")]
regret.set_index(["gold", "proxy"])[["value", "lo", "hi", "n", "status"]]

# %% [markdown]
# ## What could have been seen at all
#
# The smallest difference between two plans, in points, that so many items find four times out of five.

# %%
power = goodhart[goodhart["statistic"] == "detectable_points"]
power.pivot_table(index="gold", columns="budget", values="value")

# %% [markdown]
# ## Everything else that was asked

# %%
shown = {"correlation", "regret", "power"}
for analysis in dict.fromkeys(goodhart["analysis"]):
    if analysis not in shown:
        rows = goodhart[goodhart["analysis"] == analysis]
        rows = rows[rows["budget"] == "all"] if (rows["budget"] == "all").any() else rows
        display(Markdown(f"**{analysis}**"), rows.drop(columns="analysis").reset_index(drop=True).head(40))

# %% [markdown]
# ## Your own question
#
# For example: among the plans with nearly the lowest perplexity of a budget, how far apart are they in what matters?

# %%
near = table[table["ppl"] <= 1.02 * table.groupby("budget")["ppl"].transform("min")]
near.groupby("budget")[list(scores.columns)].agg(["min", "max", "count"])
