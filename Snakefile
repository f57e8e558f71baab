"""bitalloc: which bits and which rank for each matrix, under a byte budget, and does the answer hold?"""

from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"
configfile: "config/models.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/gates.smk"
include: "workflow/rules/retrieve.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/sweep.smk"
include: "workflow/rules/fit.smk"
include: "workflow/rules/allocate.smk"
include: "workflow/rules/tune.smk"
include: "workflow/rules/evolve.smk"
include: "workflow/rules/compress.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/humaneval.smk"
include: "workflow/rules/export.smk"
include: "workflow/rules/backends.smk"
include: "workflow/rules/schemes.smk"
include: "workflow/rules/ssm.smk"
include: "workflow/rules/profile.smk"
include: "workflow/rules/analyze.smk"
include: "workflow/rules/fairness.smk"
include: "workflow/rules/phase.smk"
include: "workflow/rules/success.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/studies.smk"


rule all:
    default_target: True
    input:
        expand("results/tiny/{product}", product=PRODUCTS),
