#!/usr/bin/env bash
# The reports under docs/results: real annotators through the whole protocol, on all-MiniLM-L6-v2 and a CPU.
#
#   benchmarks/reports.sh RAW MODEL [tweeteval|others|tried|gpu]
#
# RAW holds the raw files, a folder per dataset; MODEL is all-MiniLM-L6-v2 as a Hugging Face folder. Tasks are prepared and
# trained under runs/reports: a run that was killed goes on where it was, and what is finished is not done again. tweeteval
# has all layers, three seeds and learning rates of its own; the others take its rates, and adapters in the top two layers.
# tried: what else was tried where the logistic regression is not beaten, a JSON each; it takes rates from tweeteval too.
# gpu: all methods and seeds on all tasks, where a GPU is at hand; not made without being asked for.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..") raw=$(realpath "$1") model=$(realpath "$2")
python=$root/.venv/bin/python
declare -A tasks=(
    [tweeteval]=tasks/tweeteval
    [others]=$(echo tasks/{hatexplain,epic,cockamamie,subjectivediscourse_{response,question_sentiment,response_sentiment},studemo})
)
tasks[gpu]="${tasks[tweeteval]} ${tasks[others]}"
declare -A options=(
    [tweeteval]="--methods lora,houlsby,ia3,prefix,head --seeds 3 --epochs 3 --cold-start"
    [others]="--methods lora,head --epochs 3 --top-layers 2 --lrs-from tweeteval"
    [gpu]="--methods lora,houlsby,ia3,prompt,prefix,ptuning,head --seeds 3 --cold-start --device cuda"
)
mkdir -p "$root/runs/reports/tasks"
cd "$root/runs/reports"
ln -sfn "$model" all-MiniLM-L6-v2  # so that the commands that reports quote are those of any machine

prepare() {  # a task's folder, of the raw files
    local dataset=${1#tasks/} drawn=
    dataset=${dataset%%_*}
    [ "$dataset" != cockamamie ] || drawn="--users 100 --seed 42"
    [ -e "$1" ] || "$python" "$root/data_scripts/prepare_$dataset.py" --raw "$raw" --out tasks $drawn
}

peftu() {
    "$python" -m minipeft.bench peftu --model all-MiniLM-L6-v2 "$@"
}

from_probe() {  # NAME TASK OPTION...: the JSON is what is printed last
    [ -e "tried/$1.json" ] || { "$python" "$root/benchmarks/from_probe.py" --model all-MiniLM-L6-v2 --task "${@:2}" |
        tee "tried/$1.txt" && tail -1 "tried/$1.txt" > "tried/$1.json"; }
}

tried() {
    mkdir -p tried "$root/docs/results/tried"
    for task in tasks/tweeteval ${tasks[others]/tasks\/studemo}; do  # one label each, which studemo has not
        prepare "$task"
        from_probe "from_probe_${task#tasks/}" "$task" --methods head --epochs 8 --lrs 3e-3,1e-2,3e-2,1e-1
    done
    from_probe from_probe_lora_tweeteval tasks/tweeteval --methods head,lora
    from_probe from_probe_lora_epic tasks/epic --methods lora --lrs 2.1e-3
    peftu --tasks tasks/subjectivediscourse_question_sentiment --methods head --epochs 3 --top-layers 2 \
        --lrs 2.1e-3,6.3e-3 --out sentiments
    peftu --tasks tasks/tweeteval --methods lora,houlsby,prefix,head --epochs 8 --lrs-from tweeteval --out tweeteval8
    cp sentiments/result.json tried/question_sentiment_rates.json
    cp tweeteval8/result.json tried/tweeteval_8_epochs.json
    cp tried/*.json "$root/docs/results/tried/"
}

for run in ${3:-tweeteval others tried}; do
    if [ "$run" = tried ]; then
        tried
        continue
    fi
    for task in ${tasks[$run]}; do
        prepare "$task"
    done
    peftu --tasks ${tasks[$run]} ${options[$run]} --out "$run"
    mkdir -p "$root/docs/results/$run"
    rm -rf "$root/docs/results/$run/figures"
    cp -r "$run"/{report.html,report.md,figures,result.json} "$root/docs/results/$run/"
done
