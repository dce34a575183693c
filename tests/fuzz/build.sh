#!/bin/sh
# Build the fuzz harnesses with gcc and the sanitizers: build.sh [DIRECTORY]
#
# With clang and libFuzzer instead of the driver here:
#   CC=clang ENGINE=-fsanitize=fuzzer sh tests/fuzz/build.sh
set -eu

here=$(cd "$(dirname "$0")" && pwd)
to=${1:-$here/build}
flags="-std=c11 -D_GNU_SOURCE -g -O1 -Wall -Wextra -Werror
    -fsanitize=address,undefined -fno-sanitize-recover=all ${ENGINE:-}"

compile() {
    # shellcheck disable=SC2086
    ${CC:-gcc} $flags -I"$here/../../csrc" -I"$here" "$@"
}

mkdir -p "$to"
for source in "$here"/../../csrc/*.c; do
    compile -c -o "$to/$(basename "$source" .c).o" "$source"
done
[ -n "${ENGINE:-}" ] || compile -c -o "$to/driver.o" "$here/driver.c"
for name in decode text admit diff events probe; do
    compile -o "$to/fuzz_$name" "$here/fuzz_$name.c" "$to"/*.o -lpthread
done
