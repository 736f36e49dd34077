#!/bin/sh
# Make a PostgreSQL server available to the store's tests, where this user may install packages. Where it cannot be had, say so
# and go on: those tests then skip with that reason. No server is started: the tests start their own.
set -u
if command -v initdb >/dev/null 2>&1 || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "no PostgreSQL and no apt-get: its tests will be skipped; install a server to run them" >&2
    exit 0
fi
as_root=""
if [ "$(id -u)" != 0 ]; then
    if ! sudo -n true 2>/dev/null; then
        echo "no PostgreSQL, and no right to install it: its tests will be skipped (sudo apt-get install postgresql)" >&2
        exit 0
    fi
    as_root="sudo -n"
fi
echo "Installing PostgreSQL for the store's tests (once)"
# No cluster of the system's: Debian would start one.
$as_root mkdir -p /etc/postgresql-common
[ -e /etc/postgresql-common/createcluster.conf ] || echo "create_main_cluster = false" |
    $as_root tee /etc/postgresql-common/createcluster.conf >/dev/null
$as_root apt-get update -qq >/dev/null 2>&1
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends postgresql \
    >/dev/null 2>&1 || echo "apt-get could not install PostgreSQL: its tests will be skipped" >&2
exit 0
