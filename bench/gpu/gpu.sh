#!/usr/bin/env bash
# Everything worth knowing about a GPU, in one command and some thirty minutes:
#
#     bash bench/gpu/gpu.sh --out DIR
#     bash bench/gpu/gpu.sh --out DIR --dry-run      # the steps that a CPU can run, in Triton's interpreter, at tiny sizes
#
# Needs a checkout, Python with PyTorch, Triton, pytest, pytest-benchmark and hypothesis, and the C compiler and Python
# headers that Triton builds its launcher with: no installation, no network. What is missing, ncu and compute-sanitizer
# too, its step says. A step that fails or takes too long does not stop the next; the exit status is 0 only if none failed.
# Written to DIR: environment.txt, tests.txt, kernels.json, tuned.txt for FASTGRAD_TUNED, one JSON file a table, ncu.csv,
# sanitizer.txt and, last, summary.md.
set -u

out=
dry=
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out needs a folder}; shift 2 ;;
        --dry-run) dry=1; shift ;;
        *) echo "usage: bash bench/gpu/gpu.sh --out DIR [--dry-run]" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "usage: bash bench/gpu/gpu.sh --out DIR [--dry-run]" >&2; exit 2; }
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/../.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-$(command -v python3 || command -v python)}
# What an installation warns of is no error here, as it is in the suite.
pytest=("$python" -m pytest -q -p no:cacheprovider -W default)

tiny=
if [ -n "$dry" ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
    tiny=--tiny
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu/gpu.sh: PyTorch sees no CUDA device; --dry-run walks through the steps without one" >&2
    exit 2
fi

steps=()
failed=0
# step NAME SECONDS FILE COMMAND...: run, show and keep the output, remember the outcome.
step() {
    local name=$1 seconds=$2 file=$3 start=$SECONDS status code
    shift 3
    # A walk through on a busy machine says nothing about time.
    [ -z "$dry" ] || seconds=$((4 * seconds))
    printf '\n== %s\n' "$name"
    # An interrupted pytest still writes what it has measured.
    timeout --signal=INT --kill-after=60 "$seconds" "$@" 2>&1 | tee -a "$file"
    code=${PIPESTATUS[0]}
    case $code in
        0) status="passed, $((SECONDS - start)) s" ;;
        124|137) failed=1 status="FAILED: stopped after $seconds s" ;;
        *) failed=1 status="FAILED: exit status $code" ;;
    esac
    steps+=(--step "$name=$status")
    echo "== $name: $status"
}
skip() { echo "== $1: skipped, $2"; steps+=(--step "$1=skipped: $2"); }
have() { command -v "$1" >/dev/null 2>&1; }
imports() { "$python" -c "import $1" >/dev/null 2>&1; }

rm -f "$out"/{environment.txt,tests.txt,last-layer.json,rows.json,network.json,end-to-end.json,kernels.json,tuned.txt,ncu.csv,sanitizer.txt,summary.md}

[ -n "$dry" ] || ! have nvidia-smi || step "nvidia-smi" 20 "$out/environment.txt" nvidia-smi
step "environment" 60 "$out/environment.txt" "$python" -m fastgrad doctor

if imports pytest && imports pytest_benchmark && imports hypothesis; then
    # On a device the tests of kernels and operators run on it, without the interpreter.
    tests=(tests/kernels tests/ops tests/gradients/test_contrasts.py)
    [ -z "$dry" ] || tests=(tests/gradients/test_contrasts.py -k "bad_input or bad_row" -x)
    # Most of it is the compilation of some 300 variants of the kernels.
    ! imports xdist || tests+=(-n 4)
    step "test suite" 600 "$out/tests.txt" "${pytest[@]}" "${tests[@]}"
else
    skip "test suite" "pytest, pytest-benchmark or hypothesis is not installed: nothing says that the kernels are right"
fi

if imports pytest_benchmark; then
    cases=(--size gpu)
    [ -z "$dry" ] || cases=(--size tiny -k rows)
    # A third of it is torch.compile.
    step "micro benchmarks" 600 /dev/null \
        "${pytest[@]}" bench/micro --out "$out" --threads 1 "${cases[@]}"
else
    skip "micro benchmarks" "pytest-benchmark is not installed"
fi
times=10000
[ -z "$dry" ] || times=2
step "repeats" 300 "$out/sanitizer.txt" "$python" -m bench.gpu.kernels --repeat "$times" --tiny
step "times and predictions" 300 /dev/null "$python" -m bench.gpu.kernels --out "$out" $tiny
step "measured choices" 600 /dev/null "$python" -m bench.gpu.tune --out "$out/tuned.txt" $tiny

once=("$python" -m bench.gpu.kernels --once)
metrics=dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,lts__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,gpu__time_duration.sum,launch__registers_per_thread
if [ -n "$dry" ]; then
    step "one launch of each kernel" 60 "$out/sanitizer.txt" "${once[@]}" --tiny
else
    if have ncu; then
        step "profiler counters" 150 /dev/null ncu --csv --log-file "$out/ncu.csv" --metrics "$metrics" \
            --kernel-name "regex:contrast|rows|moments|finish|direct|gram" --launch-count 40 "${once[@]}"
    else
        skip "profiler counters" "ncu is not installed"
    fi
    if have compute-sanitizer; then
        # What PyTorch's allocator holds beyond a tensor hides accesses beyond it, and memory that nobody wrote.
        for tool in memcheck racecheck initcheck synccheck; do
            step "compute-sanitizer $tool" 180 "$out/sanitizer.txt" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                compute-sanitizer --tool "$tool" --error-exitcode 9 "${once[@]}" --tiny
        done
    else
        skip "compute-sanitizer" "it is not installed"
    fi
fi

"$python" -m bench.gpu.summary --out "$out" "${steps[@]}" ${dry:+--dry-run} || failed=1
printf '\n%s\n' "$out/summary.md"
exit $failed
