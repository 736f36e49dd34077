#!/bin/sh
# Make Debian's chromium available to the browser tests, where this user may install packages. Where it cannot be had,
# say so and go on: the browser tests then skip with that reason.
set -u
if command -v chromium >/dev/null 2>&1; then
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "no chromium and no apt-get: browser tests will be skipped; install chromium to run them" >&2
    exit 0
fi
as_root=""
if [ "$(id -u)" != 0 ]; then
    if ! sudo -n true 2>/dev/null; then
        echo "no chromium, and no right to install it: browser tests will be skipped (sudo apt-get install chromium)" >&2
        exit 0
    fi
    as_root="sudo -n"
fi
echo "Installing chromium for the browser tests (once)"
$as_root apt-get update -qq >/dev/null 2>&1
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core \
    >/dev/null 2>&1 || echo "apt-get could not install chromium: browser tests will be skipped" >&2
exit 0
