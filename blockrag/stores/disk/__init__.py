"""The store in a local directory, shared by the processes of one machine.

The directory is a diskcache (grantjenks.com/docs/diskcache): an SQLite index, small values in its rows, values of 32
KiB and more in files of their own. diskcache as it comes pickles, follows file names out of the directory, obeys
settings found in it, and evicts ten entries at a time (CVE-2025-69872 describes the first and has no fixed release).
So everything here goes through a hardened `Disk` and `Cache`, and only this package knows diskcache:

- Values are bytes, keys are block keys. Pickled values and pickled keys are refused, never loaded, never written.
- A value file's name must be one this package makes (`ab/<30 hex digits>.val`), and must lead to a regular file in the
  directory: absolute names, `..`, symbolic links and pipes are refused before anything is opened or removed.
- Settings and pragmas come from this package. An index that holds others, or views, or triggers that do anything but
  keep the totals, is refused. Directory 0700, files 0600.

A value file is complete before its row is committed, so a killed writer leaves no partial value, only a file without a
row, which a later open removes. Nothing is synchronized to the medium: after a power failure a row may point to a file
that is short or gone. That is a miss (the lengths disagree, or the codec's checksum does), and a KV state is never the
only copy of anything. On a full disk nothing is lost, and deleting blocks that have files makes room by itself; what
lies in the index needs some megabytes from elsewhere before it can be deleted. SQLite's write-ahead log needs shared
memory: keep the directory on a local file system, not on NFS.

    store.py              DiskStore: what every store does, the order of use, whose turn it is
    eviction.py           what goes when a byte budget is spent
    directory.py          what lies in the directory, who may read it, the lock of writers under a budget
    index.py              the rows: diskcache's tables, over safe connections and a known schema
    rows.py               what a row may hold
    values.py             the value files
    fingerprint_files.py  which fingerprints wrote here
    sweeping.py           removes what killed writers left
    checking.py           verify
    rebuilding.py         a new index from the value files
    gate.py               who is at work, so that connections are closed, and processes fork, when nobody is
    failures.py           from errors of the system to the store's own
"""

from blockrag.stores.disk.rebuilding import rebuild_index
from blockrag.stores.disk.store import DiskStore

__all__ = ["DiskStore", "rebuild_index"]
