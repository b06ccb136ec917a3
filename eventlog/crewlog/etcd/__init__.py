"""Keep a store in an etcd cluster: the other engine, for workers of many hosts.

Format
    Under a prefix P lie, as values, the same bytes that a directory has in files (no prefix can
    hold a colon, so a store below this one disturbs nothing):

    P/:store                store.json: who the store is; written once
    P/:head                 {"store","seq","hash","totals"}: how far the log goes, and its last hash
    P/:e/<seq, 16 digits>  the lines of one transaction, under the seq of its last one, and the
                          token of the attempt that wrote them
    P/:w/<sid>              the worker's record after all lines up to head
    P/:s/<first>            a sealed part of the history: last seq, bytes, newest time, when sealed
    P/:b/<seq>/<n>          the state before the oldest event that is kept, in pieces
    P/:l/<sid>~<id>         there while that lease is kept, and P/:beat/… while its beat is fresh
    P/:t/<sid>              the turn to start a worker, on a lease of who has it
    P/:c/<name> P/:o/<name> a subscriber's position, and its owner, on a lease
    P/:q/<random>           a writer's place in the queue, on a short lease
    P/:m                    a migration into here has begun and not ended

Valid if and only if
    A line counts once it is in the cluster: etcd answers after a quorum has synced it. Head, lines
    and records change in one transaction, so they never disagree.

Writer
    Read head and the records it is about; decide; IF head is still those bytes, byte for byte, THEN
    put head, the lines and the records, ELSE look again. **The commit point is that transaction.**
    No lock: who loses the race twice, or finds others waiting, takes a place in a queue
    (waiters.py), and a transaction also needs that nobody stands before its writer.

Exactly once
    Head holds the seq and the hash of the whole history, so its bytes never come back: an attempt
    upon seq n can only ever write the line n + 1. Without an answer the same attempt is sent again.
    If head has moved on by then, the event that holds n + 1 tells by its token whether it was this
    attempt; if it was another's, this one can never succeed any more, and the writer decides anew.

Reader
    head, then the lines up to it. A watcher is woken by etcd's watch on head and reads the lines by
    their keys; what ends or delays that stream changes nothing about what is delivered.

Life and death
    Across hosts a worker lives as long as its lease; a process beside it (keeper.py) keeps that as
    long as the worker's own process lives. A pid of another host is never looked at.
"""
