"""The pages that people read, the paper, the notebook, and the figures of the stages behind them.

report.html is not what `snakemake --report` writes: a rule cannot report on the run that it is part of, and that page
shows one figure a click, by scripts. Captions and categories are there for it all the same:
`snakemake results/tiny/report.html --report run.html` adds the rules, their code and their runtimes, and works offline.
"""

FIGURES = ["goodhart", "phase", "domains", "sensitivity", "errors", "law"]


rule report:
    input:
        verdict=passed("downstream"),
        plans="results/{model}/plans.parquet",
        evaluate="results/{model}/evaluate.parquet",
        checkpoints="results/{model}/checkpoints.parquet",
        law="results/{model}/law.parquet",
        goodhart="results/{model}/goodhart.parquet",
        success="results/{model}/success.parquet",
        controls="results/{model}/controls.parquet",
        gates="results/{model}/gates.parquet",
        protocols=protocols,
        figures=expand("results/{{model}}/{name}.png", name=FIGURES),
        captions=expand("workflow/report/{name}.rst", name=FIGURES),
        template="workflow/report/page.html",
    output:
        markdown=report("results/{model}/report.md", caption="../report/report.rst", category="{model}"),
        html=report("results/{model}/report.html", caption="../report/report.rst", category="{model}"),
    log:
        "logs/{model}/report.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        code=code("report", "documents", "analyze"),
    script:
        "../../scripts/report.py"


rule report_paper:
    input:
        verdict=passed("downstream"),
        inventory="results/{model}/inventory.parquet",
        moments="results/{model}/moments.parquet",
        sweep="results/{model}/sweep.parquet",
        sensitivity="results/{model}/sensitivity.parquet",
        law="results/{model}/law.parquet",
        plans="results/{model}/plans.parquet",
        checkpoints="results/{model}/checkpoints.parquet",
        evaluate="results/{model}/evaluate.parquet",
        goodhart="results/{model}/goodhart.parquet",
        success="results/{model}/success.parquet",
        controls="results/{model}/controls.parquet",
        gates="results/{model}/gates.parquet",
        figures=expand("results/{{model}}/{name}.png", name=FIGURES),
        captions=expand("workflow/report/{name}.rst", name=FIGURES),
        template="workflow/report/paper.tex",
    output:
        paper=report("results/{model}/paper/main.tex", caption="../report/paper.rst", category="{model}"),
        figures=expand("results/{{model}}/paper/{name}.png", name=FIGURES),
    log:
        "logs/{model}/report_paper.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("report"),
        code=code("paper", "analyze"),
    script:
        "../../scripts/report_paper.py"


rule report_notebook:
    input:
        verdict=passed("downstream"),
        plans="results/{model}/plans.parquet",
        evaluate="results/{model}/evaluate.parquet",
        goodhart="results/{model}/goodhart.parquet",
        gates="results/{model}/gates.parquet",
        source="workflow/notebooks/goodhart.py",
    output:
        report("results/{model}/goodhart.ipynb", caption="../report/notebook.rst", category="{model}"),
    log:
        "logs/{model}/report_notebook.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        code=code("documents.notebook", "tables", "statistics"),
    script:
        "../../scripts/report_notebook.py"


rule report_figures:
    input:
        sensitivity="results/{model}/sensitivity.parquet",
        sweep="results/{model}/sweep.parquet",
        law="results/{model}/law.parquet",
        residuals="results/{model}/residuals.parquet",
        verdicts=["results/{model}/gates/sweep.json", "results/{model}/gates/fit.json"],
    output:
        sensitivity=report("results/{model}/sensitivity.png", caption="../report/sensitivity.rst", category="{model}"),
        errors=report("results/{model}/errors.png", caption="../report/errors.rst", category="{model}"),
        law=report("results/{model}/law.png", caption="../report/law.rst", category="{model}"),
    log:
        "logs/{model}/report_figures.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("fit", "sensitivity"),
        code=code("figures"),
    script:
        "../../scripts/report_figures.py"


rule report_domains:
    input:
        plans="results/{model}/plans.parquet",
        checkpoints="results/{model}/checkpoints.parquet",
        goodhart="results/{model}/goodhart.parquet",
        gates="results/{model}/gates.parquet",
    output:
        report("results/{model}/domains.png", caption="../report/domains.rst", category="{model}"),
    log:
        "logs/{model}/report_domains.log",
    conda:
        "../../envs/bitalloc.yaml"
    params:
        settings=section("retrieve"),
        code=code("figures"),
    script:
        "../../scripts/report_domains.py"
