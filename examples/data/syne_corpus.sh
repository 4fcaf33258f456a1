#!/usr/bin/env bash
# Llama-3-SynE's twelve sources (arXiv 2407.18743) to the token files that examples/llama3_8b/syne.yaml reads, on a
# Slurm cluster: an array of 64 tasks and a merge for each source. Give it again to submit what is missing.
#   examples/data/syne_corpus.sh --partition cpu --account me --time 8:00:00
#   examples/data/syne_corpus.sh --print                             show the batch scripts, submit nothing
#   python launch/prepare.py --status data/web-cn data/web-en        how far they are
# In: corpus/SOURCE/, JSONL (plain, .gz, .zst) or parquet with a field "text". The four Chinese sources are read in
# the order of their files: score and order them first, as examples/data/curate.sh does (score-perplexity, order).
# The paper's rules are the defaults: no BOS, documents under 10 tokens dropped, EOS appended. A malformed line is set
# aside in data/SOURCE.quarantine.jsonl. Held out, chosen here: one document in a thousand.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
SOURCES="web-cn encyclopedia-cn book-cn qa_forum-cn
  web-en encyclopedia-en book-en qa_forum-en paper-en math-en code-en synthesis-en"
jobs=()
for source in $SOURCES; do
  jobs+=(--job "corpus/$source" "data/$source")
done
exec "$PYTHON" launch/prepare.py "${jobs[@]}" --tokenizer weights/Meta-Llama-3-8B --shards 64 --cpus-per-task 16 \
  --valid-suffix _valid --valid-fraction 0.001 --on-error skip "$@"
