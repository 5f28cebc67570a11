#!/usr/bin/env python3
"""Load tester for chat servers: how fast a broadcast reaches everybody, and whether all saw the same, in one order.

    python3 loadtest.py -n 200                           against a chat.py server of its own
    python3 loadtest.py -n 200 --port 6667               against any IRC server
    python3 loadtest.py --faults                         what broken and hostile peers do to the others

Sections, from pure to effectful; each uses only those above it:

    limits               every bound with its reason
    messages             what is sent, and which received line is exactly one of them
    sampling             which deliveries are timed, whatever time they take
    checker              complete histories -> findings, each with its smallest witness
    statistics           percentiles, histogram, thresholds
    text report          a result as a page of text
    HTML report          results as a page with charts
    server under test    one that runs, or one that is started here
    clients              a thread each: joins, and stores what arrives and when
    run                  the schedule, the senders, progress
    reflector            the least that a server can do, to calibrate
    disturbers           broken and hostile peers: what each of them does, in a process of their own
    analysis             what a run left behind -> a result
    command line         argparse, main

A run stores numbers and times only; everything is judged afterwards. Latency counts from the moment at which the
schedule wanted a message sent, so neither a stalled server nor a late load tester can hide its delay, up to the
moment at which the kernel had it for the receiver, so a late thread here adds none.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import hashlib
import html
import itertools
import json
import math
import operator
import os
import platform
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import string
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from functools import cached_property, partial
from itertools import combinations, filterfalse, islice, repeat
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    cast,
)

VERSION = "0.1"
SCHEMA = 2  # of the JSON: a new number when a key goes or changes its meaning

# -----------------------------------------------------------------------------
# limits
# -----------------------------------------------------------------------------

TEXT_BYTES = 18  # M, a number in 8 digits, a dash, 8 digits that nobody can guess
RECV_BYTES = 1 << 16  # one chunk
SWITCH_CLIENT_S = 25e-6  # thread switch interval per client: each that wants to run wakes once in it, for nothing
STACK_BYTES = 256 << 10  # of a thread: the default of 8 MiB would forbid thousands of them
START_S = 30.0  # for a server that we start to listen
STOP_S = 5.0  # for it, and what it started, to end by itself
STOP_LOOK_S = 0.02
TLS_WAIT_S = 0.5  # longest wait within a TLS connection before its thread looks whether it is to stop
JOIN_S = 30.0  # for one client to get in
MAX_LINES = 4_000_000  # different ones that are kept, and told apart
MAX_LINE_BYTES = 1 << 16  # a longer one is cut
OVERTIME_S = 3.0  # senders that are late may send for so long after the end
QUIET_S = 3.0  # after the last send: when nothing has come for so long, nothing will
PROGRESS_S = 0.1  # how often progress is shown
# A thread that wakes takes 10 us or more of a processor each time, from the server, too. So many may wake in a second
# for a message each: if there are more, clients take turns in being watched. The others read so often in all.
WAKEUPS, READS = 8_000, 5_000
READ_EVERY_S = 0.05  # but each of them not oftener
LATE_S = 5.0  # so long after its turn a client still waits for the messages of it; then it looks READS times a second
SLOT_NS = 125_000_000  # a turn at least
CHANGES = 1_000  # clients at most begin a turn in a second
LEAD_NS = 15_000_000  # a client is awake so long before its turn, and up to four times so long: not all wake at once
DRAIN_S = 20.0  # after the last send, however slowly the rest trickles in
PAUSE_S = 0.5  # without an arrival, when all has come that is expected: senders may get their own
SENT_WITH_BYTES = 60  # a text: source, command and target
MIN_SIZE, MAX_SIZE = TEXT_BYTES, 400  # bytes of a text: a line of IRC has 512
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)
BEHIND = 5_000  # messages that a receiver may be behind, when nothing else slows the senders: servers drop slow ones
FLOOD_RATE = 30_000  # messages/s to reckon with, when sending as fast as the server accepts
SLACK_NS = 100_000  # sleeping ends late by about so much; the rest is waited for awake
LATE_MS = 1.0  # a load tester whose sends are later than this, and a third of the p99, is marked as the limit
RETRY_S = 0.05  # after that a client that was not let in again comes once more
STEADY_NS = 100_000_000  # delivery is steady from the slot on in which no median is above the p99 of before
NEWCOMER_INTERVAL_S = 0.1  # between two visits of the witness who connects anew
DISTURBER_LIFE_S = 1.0  # of a disturber that comes and goes
DISTURBER_PAUSE_S = 0.1  # a disturber that was closed is back
LAST_WORDS_S = 0.5  # at the end a disturber that did not read looks for so long whether it was dropped
SEND_BYTES = 1 << 16  # that a disturber's socket keeps: what it got rid of is what the server took, nearly
LAST_WORDS_BYTES = 1000  # of what a disturber heard, to find out why it was closed
MODES = 4  # bans in one line
TURNS = 20  # of what a disturber says again and again, in one send
PER_ADDRESS = 16  # disturbers at most from one source address: so many does chat.py let in
FAULT_P99_MS, FAULT_RATIO, FAULT_NEWCOMERS_MS = 200.0, 10.0, 1000.0  # what is still good while others do their worst
FAULT_LOAD = {"rate": 500.0, "rounds": 1}  # defaults with --faults: all of it within five minutes
GIL = getattr(sys, "_is_gil_enabled", lambda: True)()  # CPython 3.13 can be built, and told, to do without
KERNEL_CLOCK = sys.platform == "linux"
SO_TIMESTAMPNS = 35  # <asm-generic/socket.h>: the kernel's own time of arrival; the socket module has no name for it
CLOCK_OFFSET = time.time_ns() - time.perf_counter_ns()
THROTTLED = 1.2  # times as long as asked, and the server is said to throttle
ROUGH = 0.001  # of the timed deliveries may be timed roughly without a word
LAST_WORDS_LINES = 3  # at the end of what a client received
LOAD_KEYS = ("clients", "senders", "rate", "duration_s", "warmup_s", "size", "seed")
FLOOD_CONTROL = (
    "its flood control; lift it: ngircd MaxPenaltyTime = 0, InspIRCd <connect fakelag=no commandrate=... recvq=...>,"
    " Ergo fakelag: enabled: false"
)
ADDRESS_LIMIT = (
    "its limit of connections; lift it: ngircd MaxConnectionsIP = 0, InspIRCd <connect localmax=...>,"
    " Ergo ip-limits: count: false, chat.py --max-clients"
)
HINTS = {  # what servers say when their own limits strike, and the settings that lift them
    "flood": FLOOD_CONTROL,
    "recvq": FLOOD_CONTROL,
    **dict.fromkeys(
        ("too many connections", "no more connections", "too many host", "too many clients"), ADDRESS_LIMIT
    ),
    "throttl": "its limit of connects; lift it: InspIRCd <connectban>, Ergo ip-limits: throttle: false",
    "password": "it wants a password; give it by --password-file",
}
JOIN_HINTS = {"connection was closed": ADDRESS_LIMIT, "connection reset": ADDRESS_LIMIT}  # while joining only


class FatalError(Exception):
    """Something that ends the program with exit code 2; its text says what and what to do."""


def now_ns() -> int:
    """Unix time: as the kernel tells it, if it tells that of arrivals; elsewhere it may tick in steps of 15.6 ms."""
    return time.time_ns() if KERNEL_CLOCK else CLOCK_OFFSET + time.perf_counter_ns()


# -----------------------------------------------------------------------------
# messages
# -----------------------------------------------------------------------------


MARK = re.compile(r"M([0-9a-f]{8})-[0-9a-f]{8}")
MARKED = re.compile(rb"M[0-9a-f]{8}-[0-9a-f]{8}")  # wherever it is
SOURCE = re.compile(rb"c(0|[1-9]\d{0,5})(![^ !@]+@[^ !@]+)?")
PRIVMSG = re.compile(rb":([^ !@]+![^ !@]+@[^ !@]+) PRIVMSG ([^ ]+) :?([^\r]*)\r?")
JSON_KEYS = {"type", "user", "text", "channel", "id", "time"}
NOT_SAID = b"", "", ""
OTHERS = 1 << 31  # from here on numbers are those of lines that are no message
HEEDED = 3 << 30  # and from here on of those that a client acts on
# The answer to what each client asks when all are in: what comes after it belongs to the run.
SETTLED = {
    "irc": re.compile(rb":[^ ]+ PONG [^\r]*\r?"),
    "plain": re.compile(rb"\*\*\* (?:The topic of #|#[^ ]+ has no topic).*"),
    "json": re.compile(rb'\{[^\n]*"event": ?"(?:no-)?topic".*'),
}
NOTHING = re.compile(rb"(?!)")
# WebSocket (RFC 6455): a frame that is all of a text, before an object of JSON, its length as short as can be; and what
# servers may say besides. Opcodes are with the bit of a last frame.
TEXT_FRAME = re.compile(rb"\x81(?:[\0-\x7d]|\x7e(?!\0[\0-\x7d])[\0-\xff]{2})(?=\{)")
PING_FRAME = re.compile(rb"\x89[\0-\x7d]([\0-\xff]*)")
TEXT_OPCODE, PONG_OPCODE = 0x81, 0x8A
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
PING = re.compile(rb"(?::[^ ]+ )?PING (:?[^ \r]+)\r?")
NAMES = re.compile(rb":[^ ]+ 353 [^\n]* :([^\r]*)\r?")  # RPL_NAMREPLY
KINDS = {"irc": PING, "plain": NOTHING, "json": NOTHING, "ws": PING_FRAME}  # what else is expected during a run
# What the peers of --faults, and newcomers, may say or do; and what is told of a client of ours that is gone.
DISTURBER = re.compile(rb":(?!c\d+!)[^ !]+![^ ]+ (?:JOIN|PART|QUIT|NICK|MODE|NOTICE|PRIVMSG) .*", re.DOTALL)
GONE = r""":{0}![^ ]+ (?:QUIT|PART)\b.*|\*\*\* {0} left\b.*|\{{"type": ?"system", [^\n]*"user": ?"{0}".*"""


def split_lines(data: bytes) -> tuple[list[bytes], bytes]:
    """The lines in `data`, and what is no whole line yet; in C, however many there are."""
    *lines, rest = data.split(b"\n")
    return lines, rest


def split_frames(data: bytes) -> tuple[list[bytes], bytes]:
    """The same of WebSocket: frames with their heads, whatever they are."""
    frames, start, total = [], 0, len(data)
    while start + 2 <= total:
        size, at = data[start + 1] & 0x7F, start + 2
        if size > 125:
            at += 2 if size == 126 else 8
            size = int.from_bytes(data[start + 2 : at], "big")
        end = at + size + (4 if data[start + 1] & 0x80 else 0)
        if end > total:
            break
        frames.append(data[start:end])
        start = end
    return frames, data[start:]


def masked_frame(opcode: int, payload: bytes) -> bytes:
    """A frame of a client, of at most 65,535 bytes."""
    size, mask = len(payload), random.getrandbits(32).to_bytes(4, "big")
    head = bytes([opcode, 0x80 | size]) if size < 126 else bytes([opcode, 0xFE]) + size.to_bytes(2, "big")
    stream = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return head + mask + (int.from_bytes(payload, "big") ^ stream).to_bytes(size, "big")


class Wire:
    """How messages of a run look in one protocol: `line` is what is sent, `number` knows what must arrive.

    The text of a message is M, its number in 8 hexadecimal digits, a dash, 8 digits that depend on the number and on
    a key of the run, and the same filler in all: nobody can know a text before it was sent, or alter it unseen.
    Message n is of client n % senders, in every run.
    """

    def __init__(self, protocol: str, channel: str, size: int, seed: int, senders: int = 1, key: bytes = b"") -> None:
        filler = "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=max(size - TEXT_BYTES, 0)))
        # A server may strip a line's end.
        self.filler = filler.rstrip() + "." * (len(filler) - len(filler.rstrip()))
        self.protocol, self.channel, self.senders, self.key = protocol, channel, senders, key
        self.framed = protocol == "ws"  # its lines are frames: the dialect in them is that of JSON
        self.split = split_frames if self.framed else split_lines
        self.dialect = "json" if self.framed else protocol
        self.head, self.tail, self._parse = {
            "irc": (f"PRIVMSG {channel} :", "\r\n", self._parse_irc),
            "json": ('{"type": "chat", "text": "', '"}\n', self._parse_json),
            "plain": ("", "\n", self._parse_plain),
        }[self.dialect]
        self.settled, self.kinds = SETTLED[self.dialect], KINDS[protocol]
        self.fold = folding("")
        self._sources: dict[int, bytes] = {}  # sender -> its only source

    def text(self, number: int) -> str:
        """The text of message `number`."""
        mark = hashlib.blake2b(number.to_bytes(4, "big"), digest_size=4, key=self.key).hexdigest()
        return f"M{number:08x}-{mark}{self.filler}"

    def line(self, number: int) -> bytes:
        """The bytes that send message `number`."""
        return self.wrap(f"{self.head}{self.text(number)}{self.tail}".encode())

    def wrap(self, line: bytes) -> bytes:
        """The bytes that send a line."""
        return masked_frame(TEXT_OPCODE, line.rstrip()) if self.framed else line

    def bare(self, line: bytes) -> bytes:
        """What a line that was split off says; a frame that is no plain text with an object remains what it is."""
        head = TEXT_FRAME.match(line) if self.framed else None
        return line[head.end() :] if head else line

    def number(self, line: bytes) -> int:
        """The number of the message that a received line is, in source, command, target and text; else -1."""
        source, target, text = self._parse(line)
        match = MARK.match(text)
        nick = SOURCE.fullmatch(source)
        if not match or not nick or bool(nick[2]) != (self.protocol == "irc"):
            return -1
        number, sender = int(match[1], 16), int(nick[1])
        exact = number < OTHERS and number % self.senders == sender and text == self.text(number)
        exact = exact and self.fold(target) == self.fold(self.channel)
        return number if exact and self._sources.setdefault(sender, source) == source else -1

    def heeds(self, line: bytes) -> bool:
        """Whether a client acts on a line that is no message."""
        irc = self.protocol == "irc" and (PING.fullmatch(line) or NAMES.fullmatch(line))
        ping = self.framed and PING_FRAME.fullmatch(line)
        return bool(irc or ping or self.settled.fullmatch(line))

    def _parse_irc(self, line: bytes) -> tuple[bytes, str, str]:
        match = PRIVMSG.fullmatch(line)
        return (match[1], str(match[2], "utf-8", "replace"), str(match[3], "latin-1")) if match else NOT_SAID

    def _parse_plain(self, line: bytes) -> tuple[bytes, str, str]:
        source, _, text = line.partition(b": ")
        return source, self.channel, str(text, "latin-1")

    def _parse_json(self, line: bytes) -> tuple[bytes, str, str]:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            pairs = json.loads(line, object_pairs_hook=list)
            item = dict(pairs)
            plain = len(item) == len(pairs) and all(isinstance(value, str) for value in item.values())
            if plain and item["type"] == "chat" and line[:1] + line[-1:] == b"{}" and JSON_KEYS.issuperset(item):
                return item["user"].encode(), item.get("channel", self.channel), item["text"]
        return NOT_SAID


# What a server says as it closes a connection.
LAST_WORDS = re.compile(
    rb'(?::[^ ]+ )?ERROR :?([^\r]*)\r?|\*\*\* (.*)|\{[^\n]*"text": ?"([^"]*).*|\x88[\0-\xff]{3}(.+)'
)
SLOW = re.compile(r"send ?q|(?:reads|receives|reading) too slow|write buffer|output (?:queue|buffer)", re.IGNORECASE)


def folding(mapping: str) -> Callable[[str], str]:
    """How a server compares names, by its CASEMAPPING."""
    more = {"rfc1459": ("[]\\~", "{}|^"), "rfc1459-strict": ("[]\\", "{}|")}.get(mapping, ("", ""))
    table = str.maketrans(*more)
    return lambda name: unicodedata.normalize("NFKC", name.translate(table)).casefold()


class Lines(Dict[bytes, int]):
    """The number of each line that was received: that of its message, or one from OTHERS on.

    Each distinct line is judged once, however many receive it: threads look up lines and keep numbers.
    """

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.others: dict[int, bytes] = {OTHERS: b"more different lines than can be kept"}
        self._wire = wire
        self._numbers = itertools.count(HEEDED), itertools.count(OTHERS + 1)

    def __missing__(self, line: bytes) -> int:
        said = self._wire.bare(line)
        found = self._wire.number(said)
        if len(self) > MAX_LINES:
            return OTHERS if found < 0 else found
        if found < 0:
            found = next(self._numbers[not self._wire.heeds(said)])
            self.others[found] = said  # before any thread can find the number
        return self.setdefault(line, found)


# -----------------------------------------------------------------------------
# sampling
# -----------------------------------------------------------------------------


class Turns:
    """Which receivers are watched when, if all at once would be too much: groups of them take turns at random.

    Timed are the messages that were due in a receiver's turn, however late they come. So what is timed does not
    depend on how long anything took, and each delivery has the same chance.
    """

    def __init__(self, clients: int, arrivals_per_s: float, span_ns: int, seed: int) -> None:
        rng = random.Random(seed)
        self.begin = 0  # ns; set when the measurement starts
        self.groups = min(clients, max(1, math.ceil(arrivals_per_s / WAKEUPS)))
        least = max(SLOT_NS, 1_000_000_000 * clients // self.groups // CHANGES)
        cycles = max(1, int(span_ns / (self.groups * least)))  # of a turn for everybody, where there is time for that
        self.slot_ns = max(least, -(-span_ns // (self.groups * cycles)))
        places = rng.sample(range(clients), clients)
        self.group = [place % self.groups for place in places]  # of each client
        self.slots: list[int] = []  # whose turn it is
        while len(self.slots) * self.slot_ns < span_ns:
            self.slots += rng.sample(range(self.groups), self.groups)

    def at(self, moment: int) -> int:
        """The group in whose turn it is at `moment` (ns); -1 for none."""
        slot = (moment - self.begin) // self.slot_ns
        return self.slots[slot] if 0 <= slot < len(self.slots) else -1

    def of(self, client: int) -> list[tuple[int, int]]:
        """From when to when (ns) a client is watched."""
        if self.groups == 1:
            return [(0, 1 << 63)]
        starts = [self.begin + n * self.slot_ns for n, group in enumerate(self.slots) if group == self.group[client]]
        return [(start, start + self.slot_ns) for start in starts]


class Watch:
    """When one receiver wakes for each message: from shortly before its turn until all that was due in it has come."""

    def __init__(
        self,
        turns: Iterable[tuple[int, int]],
        due: Callable[[int, int], set[int]],  # messages due from one moment to another
        order: array[int],  # what it has received, as it grows
        read_every: float = READ_EVERY_S,
        lead_ns: int = LEAD_NS,  # awake so long before a turn
    ) -> None:
        self._turns, self._due, self._order, self._read_every = collections.deque(turns), due, order, read_every
        self._lead = lead_ns
        self._turn: tuple[int, int] | None = None
        self._missing: set[int] = set()  # of turns that are over
        self._give_up = 0
        self._began = self._seen = self._before = 0  # places in `order`: of the turn, looked at, at the last call

    def pause(self, now: int) -> float:
        """Seconds to sleep before the next read at `now` (ns); 0: it is watched, and waits for what comes."""
        here = len(self._order)
        if self._missing:
            self._missing.difference_update(self._order[self._seen : here])
            if now > self._give_up:
                self._missing.clear()
        if self._turn and now >= self._turn[1]:
            self._missing |= self._due(*self._turn).difference(self._order[self._began : here])
            self._give_up, self._turn = self._turn[1] + int(LATE_S * 1e9), None
        if not self._turn and self._turns and now >= self._turns[0][0] - self._lead:
            self._turn, self._began = self._turns.popleft(), self._before
        self._seen = self._before = here
        if self._turn or self._missing:
            return 0.0
        ahead = (self._turns[0][0] - self._lead - now) / 1e9 if self._turns else self._read_every
        return min(self._read_every, ahead)


class Sample:
    """The deliveries of a run that are to be timed, as far as they were: one for each receiver and message due in its
    turn. What never came counts as later than all that did.
    """

    def __init__(self, turns: Turns, sent: Sent, due: Sequence[int], times: Sequence[int]) -> None:
        self.turns, self.sent, self.due, self.times = turns, sent, due, times
        self.late: list[tuple[int, int, int]] = []  # receiver, message, ns since it was due
        self.missing: list[tuple[int, int]] = []  # receiver, message
        self.rough = 0  # timed when the receiver looked only, as it was not waiting: it was there earlier
        self._of_group: dict[int, set[int]] = defaultdict(set)
        for number, moment in enumerate(due):
            if sent.senders[number] >= 0:
                self._of_group[turns.at(moment)].add(number)

    def add(self, client: int, order: Sequence[int], chunks: Iterable[Chunk], since: int = 0) -> list[tuple[int, int]]:
        """Times what one receiver got, which was there from message `since` on; returns (message, ns) of what came
        before it was sent.
        """
        due = self._of_group[self.turns.group[client]]
        wanted = {n for n in due if n >= since and self.sent.senders[n] != client}
        early, total = [], len(self.times)
        for moment, first, last, exact in chunks:
            numbers = order[first:last]
            for number in wanted.intersection(numbers):
                self.late.append((client, number, moment - self.due[number]))
                self.rough += not exact
            wanted.difference_update(numbers)
            early += [(n, self.times[n] - moment) for n in numbers if n < total and self.times[n] > moment]
        self.missing += [(client, number) for number in wanted]
        return early


# -----------------------------------------------------------------------------
# checker
# -----------------------------------------------------------------------------

SHOWN_BYTES = 80  # of an altered line in a witness: enough to recognise it, and still one line
CHAINS = 5  # views merged at first: three clean ones that each miss one sender fix all, five outvote a faulty one
TRIES = 10  # views out of order that are compared with all others for a witness; the first nearly always has one


class Sent(NamedTuple):
    """What was sent, by message number (typecode 'i' each)."""

    senders: array[int]  # number of its sender; -1: never sent
    after: array[int]  # the last message its sender had received before sending it, which it may answer; -1: none


class History(NamedTuple):
    """What one receiver saw."""

    name: str
    sender: int  # its own number as a sender, or -1
    order: array[int]  # message numbers as they arrived, typecode 'I', unchecked
    strange: list[bytes]  # lines that are neither a message of the run nor of a kind that is expected during it
    first: int  # it was joined for messages first..last-1: only these may be demanded of it
    last: int
    early: Sequence[tuple[int, int]] = ()  # message, and how many ns before it was sent it came


class Finding(NamedTuple):
    """The result of one check."""

    check: str
    verdict: str  # "pass", "FAIL", "unknown" (nothing to judge by) or "skipped"
    count: int  # type: ignore[assignment]  # violations; nobody looks for tuple.count here
    witness: str  # the smallest of them in one line, or ""


class View(NamedTuple):
    """What one or several receivers saw alike."""

    receivers: list[History]
    order: array[int]  # the first arrival of every message that was sent; no other numbers


class Merged(NamedTuple):
    """One order of all messages: that of all views where they agree, else one that most follow."""

    order: list[int]
    astray: list[tuple[View, int, int]]  # views that do not follow it: how often they step back in it, how far at least
    jam: list[tuple[int, View]]  # where no message was first in all its views: the next message of each view


class Evidence:
    """All that the checks look at, the costly parts once."""

    def __init__(self, sent: Sent, histories: Sequence[History], echo: bool, ordered: bool) -> None:
        self.sent, self.histories, self.echo = sent, histories, echo
        self.ordered = ordered  # an order of all is demanded, so finding it pays
        self.numbers = {number for number, sender in enumerate(sent.senders) if sender >= 0}
        alike: dict[bytes, list[History]] = {}
        for history in histories:
            alike.setdefault(history.order.tobytes(), []).append(history)
        self.views = [View(receivers, self.arrivals(receivers[0].order)) for receivers in alike.values()]

    def arrivals(self, order: array[int]) -> array[int]:
        seen = dict.fromkeys(order)
        clean = len(seen) == len(order) and self.numbers.issuperset(seen)
        return order if clean else array("I", filter(self.numbers.__contains__, seen))

    @cached_property
    def merged(self) -> Merged:
        return merge(self.views, len(self.sent.senders))

    def label(self, message: int) -> str:
        return f"{message} (from s{self.sent.senders[message]})"

    def saw(self, view: View, one: int, other: int) -> str:
        saw = f"{view.receivers[0].name} saw {self.label(one)} before {self.label(other)}"
        return f"{saw}, {places(view, one, other)}"


def places(view: View, one: int, other: int) -> str:
    order = view.receivers[0].order
    return f"at {order.index(one)} and {order.index(other)}"


# A finder returns how many violations there are, and the smallest in words.
Found = Tuple[int, str]


def find_loss(evidence: Evidence) -> Found:
    losses, least = 0, (len(evidence.sent.senders), "")
    for view in evidence.views:
        absent: dict[tuple[int, int], set[int]] = {}
        for receiver in view.receivers:
            span = receiver.first, receiver.last
            if span not in absent:
                absent[span] = evidence.numbers.intersection(range(*span)).difference(view.order)
            lost = absent[span]
            if not evidence.echo:
                lost = {message for message in lost if evidence.sent.senders[message] != receiver.sender}
            losses += len(lost)
            if lost and min(lost) < least[0]:
                least = min(lost), receiver.name
    if not losses:
        return 0, ""
    lucky = next((history for history in evidence.histories if least[0] in history.order), None)
    others = f"; {lucky.name} did, at {lucky.order.index(least[0])}" if lucky else ", nor did anyone else"
    return losses, f"{least[1]} never got {evidence.label(least[0])}{others}"


def find_duplicate(evidence: Evidence) -> Found:
    copies, least = 0, (0, "")
    for view in evidence.views:
        order = view.receivers[0].order
        if len(order) == len(view.order):
            continue
        first = dict(zip(reversed(order), reversed(range(len(order)))))
        again = [place for place, n in enumerate(order) if first[n] != place and n in evidence.numbers]
        copies += len(again) * len(view.receivers)
        if again and (not least[1] or again[0] < least[0]):
            message = order[again[0]]
            text = (
                f"{view.receivers[0].name} got {evidence.label(message)} again at {again[0]}, first at {first[message]}"
            )
            least = again[0], text
    return copies, least[1]


def find_corruption(evidence: Evidence) -> Found:
    wrong, witness = 0, ""
    for receiver in evidence.histories:
        wrong += len(receiver.strange)
        if receiver.strange and not witness:
            line = min(receiver.strange, key=len)
            cut = "..." if len(line) > SHOWN_BYTES else ""
            witness = f"{receiver.name} got a line that nobody sent: {line[:SHOWN_BYTES]!r}{cut}"
    for view in evidence.views:
        order = view.receivers[0].order
        # Only a view that had to be cleaned can hold an invented number.
        invented = [n for n in order if n not in evidence.numbers] if len(order) > len(view.order) else []
        wrong += len(invented) * len(view.receivers)
        if invented and not witness:
            place = order.index(invented[0])
            witness = f"{view.receivers[0].name} got message {invented[0]} at {place}, which nobody sent"
    return wrong, witness


def find_fifo(evidence: Evidence) -> Found:
    faults, view, one, other = judge(evidence, fifo_violations)
    return faults, evidence.saw(view, one, other) if view else ""


def find_causality(evidence: Evidence) -> Found:
    faults, view, one, other = judge(evidence, causality_violations)
    early = [(-ns, message, receiver.name) for receiver in evidence.histories for message, ns in receiver.early]
    if early:
        ns, message, name = min(early)
        return faults + len(early), f"{name} got {evidence.label(message)} {-ns / 1e6:.3f} ms before it was sent"
    if not view:
        return 0, ""
    sender = evidence.sent.senders[one]
    return faults, f"{evidence.saw(view, one, other)}; s{sender} had received {other} before it sent {one}"


def find_order(evidence: Evidence) -> Found:
    astray = evidence.merged.astray
    faults = sum(times * len(view.receivers) for view, times, _ in astray)
    if not faults:
        return 0, ""
    for view, _, _ in sorted(astray, key=lambda found: found[2])[:TRIES]:
        other, one, two = disagreement(view, evidence.views)
        if other:
            opposite = f"{other.receivers[0].name} saw them the other way, {places(other, one, two)}"
            return faults, f"{evidence.saw(view, one, two)}; {opposite}"
    cycle = smallest_cycle(sorted(find_cycle(evidence.merged.jam)), evidence.views)
    links = zip(cycle, [*cycle[1:], cycle[0]])
    texts = [evidence.saw(view, one, other) for (one, view), (other, _) in links]
    return faults, f"{len(cycle)} receivers together fit no order: {'; '.join(texts)}"


def fifo_violations(sent: Sent, order: Sequence[int]) -> list[tuple[int, int]]:
    """Places of a sender's messages next to each other in `order`, the later message first."""
    found = []
    last: dict[int, int] = {}
    senders = sent.senders
    for place, message in enumerate(order):
        before = last.get(senders[message], place)
        if order[before] > message:
            found.append((before, place))
        last[senders[message]] = place
    return found


def causality_violations(sent: Sent, order: Sequence[int]) -> list[tuple[int, int]]:
    """Places of messages and of what their senders had received before, which comes later in `order`."""
    place = dict(zip(order, itertools.count()))
    causes = map(place.get, map(sent.after.__getitem__, order), repeat(-1))
    return [(effect, cause) for effect, cause in enumerate(causes) if cause > effect]


def judge(
    evidence: Evidence, faults: Callable[[Sent, Sequence[int]], list[tuple[int, int]]]
) -> tuple[int, View | None, int, int]:
    """How many `faults` all views have, and the closest two messages, with the view that saw them in this order."""
    suspects = evidence.views
    # A view that follows an order without faults has none.
    if evidence.ordered and not faults(evidence.sent, evidence.merged.order):
        suspects = [view for view, _, _ in evidence.merged.astray]
    total, closest = 0, 0
    found: tuple[View | None, int, int] = (None, 0, 0)
    for view in suspects:
        pairs = faults(evidence.sent, view.order)
        total += len(pairs) * len(view.receivers)
        gap, one, other = min(((q - p, p, q) for p, q in pairs), default=(0, 0, 0))
        if gap and (not closest or gap < closest):
            closest, found = gap, (view, view.order[one], view.order[other])
    return (total, *found)


def merge(views: Sequence[View], size: int) -> Merged:
    """Find the common order of `views`, of messages numbered below `size`.

    A few views normally fix it; views that do not follow it take part as well, until all others do. So it is exact, and
    costly for a few views only.
    """
    views = sorted(views, key=lambda view: len(view.order), reverse=True)
    rank = [-1] * size  # place in `order`, or -1
    taken: list[int] = []
    misfits = list(range(len(views)))
    while misfits:
        taken += misfits[: CHAINS + 4 * len(taken)]
        order, jam = interleave([views[n] for n in taken])
        for place, message in enumerate(order):
            rank[message] = place
        steps = [first_inversion(view.order, rank) for view in views]
        misfits = [n for n, (times, _) in enumerate(steps) if times and n not in taken]
    return Merged(order, [(view, *back) for view, back in zip(views, steps) if back[0]], jam)


def first_inversion(order: Sequence[int], rank: list[int]) -> tuple[int, int]:
    """How often `order` steps back in rank, or to a message without rank; and how far at least."""
    ranks = [-1, *map(rank.__getitem__, order)]
    steps = [one - other for one, other in zip(ranks, islice(ranks, 1, None)) if one >= other]
    return len(steps), min(steps, default=0)


def interleave(views: Sequence[View]) -> tuple[list[int], list[tuple[int, View]]]:
    """Topological sort of all messages of `views`; and where it jammed first (there is no such order), or [].

    A message is ready when it stands at the head of all views that hold it. When none is, the one goes that fewest
    receivers have further back: each of them will step back to it.
    """
    order: list[int] = []
    jam: list[tuple[int, View]] = []
    forced: set[int] = set()
    feeds = [filterfalse(forced.__contains__, view.order) for view in views]
    heads: dict[int, list[int]] = {}  # message -> the views at whose head it is
    behind: dict[int, int] = defaultdict(int)  # message -> receivers that have it further back
    for view in views:
        for message in view.order:
            behind[message] += len(view.receivers)
    ready: list[int] = []
    moving: Iterable[int] = reversed(range(len(views)))
    while True:
        for number in moving:
            head = next(feeds[number], None)
            if head is not None:
                heads.setdefault(head, []).append(number)
                behind[head] -= len(views[number].receivers)
                if not behind[head]:
                    ready.append(head)
        if not heads:
            return order, jam
        if not ready:
            jam = jam or [(message, views[number]) for message, numbers in heads.items() for number in numbers]
            ready.append(min(reversed(heads), key=behind.__getitem__))  # of several the newest: it goes on in its view
            forced.add(ready[0])
        order.append(ready.pop())
        moving = heads.pop(order[-1])


def disagreement(view: View, others: Sequence[View]) -> tuple[View | None, int, int]:
    """One of `others` and two messages that `view` saw in this order and the other one in the opposite: the closest."""
    place = dict(zip(view.order, itertools.count()))
    closest = 0
    found: tuple[View | None, int, int] = (None, 0, 0)
    for other in others:
        shared = list(filter(place.__contains__, other.order))
        at = list(map(place.__getitem__, shared))
        back = [(p - q, two, one) for p, q, one, two in zip(at, at[1:], shared, shared[1:]) if p > q]
        gap, one, two = min(back, default=(0, 0, 0))
        if gap and (not closest or gap < closest):
            closest, found = gap, (other, one, two)
        if closest == 1:
            break
    return found


def find_cycle(jam: list[tuple[int, View]]) -> list[int]:
    """Some messages that block each other in a circle."""
    blocks: dict[int, int] = {}  # message -> one that a view saw before it
    heads = {message for message, _ in jam}
    for head, view in jam:
        blocks.update((message, head) for message in heads.intersection(view.order) if message != head)
    chased = [jam[0][0]]
    while blocks[chased[-1]] not in chased:
        chased.append(blocks[chased[-1]])
    return chased[chased.index(blocks[chased[-1]]) :]


def smallest_cycle(messages: Sequence[int], views: Sequence[View]) -> list[tuple[int, View]]:
    """Of `messages` the fewest, each with the view that saw it before the next one, the last one before the first."""
    later: dict[int, dict[int, View]] = {message: {} for message in messages}
    for view in views:
        for one, other in combinations(filter(later.__contains__, view.order), 2):
            later[one].setdefault(other, view)
    cycles = [cycle_through(message, later) for message in messages]
    return min(filter(None, cycles), key=len)


def cycle_through(start: int, later: dict[int, dict[int, View]]) -> list[tuple[int, View]]:
    """The shortest way from `start` back to it, or []."""
    came: dict[int, tuple[int, View]] = {}
    queue = [start]
    for message in queue:
        for following, view in later[message].items():
            if following not in came:
                came[following] = message, view
                queue.append(following)
        if start in came:
            break
    cycle = [came[start]] if start in came else []
    while cycle and cycle[-1][0] != start:
        cycle.append(came[cycle[-1][0]])
    return cycle[::-1]


FINDERS: dict[str, Callable[[Evidence], Found]] = {
    "loss": find_loss,
    "duplicate": find_duplicate,
    "corruption": find_corruption,
    "fifo": find_fifo,
    "order": find_order,
    "causality": find_causality,
}
CHECKS = tuple(FINDERS)


def check(sent: Sent, histories: Sequence[History], echo: bool, checks: Collection[str] = CHECKS) -> list[Finding]:
    """Judge a complete run: one Finding for each of CHECKS, in that order; those not in `checks` are skipped.

    `echo`: senders get their own messages back; if not, these are not demanded of them. Ten million deliveries take
    seconds and a few hundred MB, unless most receivers saw different orders.
    """
    evidence = Evidence(sent, histories, echo, "order" in checks)
    arrived = any(view.order for view in evidence.views)
    silent = not any(history.order or history.strange for history in histories)
    findings = []
    for name in CHECKS:
        if name not in checks or silent:
            findings.append(Finding(name, "unknown" if name in checks else "skipped", 0, ""))
            continue
        faults, witness = FINDERS[name](evidence)
        findings.append(Finding(name, "FAIL" if faults else "pass" if arrived else "unknown", faults, witness))
    return findings


def deliveries(sent: Sent, histories: Sequence[History]) -> int:
    """How many messages were received, each once by each receiver."""
    return sum(len(view.order) * len(view.receivers) for view in Evidence(sent, histories, False, False).views)


# -----------------------------------------------------------------------------
# statistics
# -----------------------------------------------------------------------------

Result = Dict[str, Any]
Threshold = Tuple[str, str, float]
Points = List[Tuple[float, Optional[float]]]  # None is a gap in the line

WIDTH = 80  # columns of a terminal
LABEL = 13  # columns of a label at the left and the space after it, fits "uncorrected"
HISTOGRAM_ROWS = 12  # so that a whole report fits on one screen
BAR = 42  # columns of the longest bar
# Renard's R10 series (ISO 3): ten steps a decade, evenly spaced in the logarithm and yet round. From 1 us to 80 days.
BOUNDS = [float(f"{step}e{power}") for power in range(-3, 10) for step in (1, 1.25, 1.6, 2, 2.5, 3.15, 4, 5, 6.3, 8)]
# Points of the curve in each decade of 1 - quantile, in percent of the decade.
TAILS = (100, 80, 65, 50, 40, 32, 25, 20, 16, 13)
PERMILLE = {"p50": 500, "p90": 900, "p99": 990, "p99.9": 999, "max": 1000}
TIMES = {"us": 0.001, "ms": 1.0, "s": 1000.0}  # units of a threshold, in ms
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
MEASURES = (*PERMILLE, "throughput", "cpu", "lost")
SIGNIFICANT = 0.05  # a sign test's p up to which a difference is no noise
PROMISES = {"duplicate": "once", "corruption": "unchanged", "order": "in one order"}  # what a passed check proves


def summarize(values: Sequence[float], per_ms: float = 1) -> dict[str, float | None]:
    """Exact nearest-rank percentiles in ms of `values`, of which `per_ms` make one ms; {"samples": 0} of none.

    Infinite is what never came: a percentile that it reaches is not known. Quickest where the values are sorted.
    """
    ordered, count = sorted(values), len(values)
    if not count:
        return {"samples": 0}
    ranks = {name: -(-count * permille // 1000) for name, permille in PERMILLE.items()}
    found = {name: ordered[rank - 1] / per_ms for name, rank in ranks.items()}
    return {"samples": count, **{name: value if value < math.inf else None for name, value in found.items()}}


def histogram(ordered: Sequence[float], per_ms: float = 1) -> list[list[float]]:
    """[upper bound in ms, how many are at most that and above the one before] of sorted values, empty ends cut off."""
    places = [0, *(bisect_right(ordered, round(bound * per_ms, 6)) for bound in BOUNDS)]
    first, last = bisect_right(places, 0) - 1, bisect_right(places, len(ordered) - 1)
    return [[BOUNDS[i], places[i + 1] - places[i]] for i in range(first, last)]


def curve(ordered: Sequence[float], per_ms: float = 1) -> list[list[float]]:
    """[quantile, ms] of sorted values, ten points for each further nine of the quantile, the last one [1, maximum]."""
    count, points, whole = len(ordered), [], 100
    while count * 100 >= whole:
        for tail in TAILS:
            beyond = count * tail // whole
            if beyond:
                points.append([(whole - tail) / whole, ordered[max(0, count - beyond - 1)] / per_ms])
        whole *= 10
    return [*points, [1.0, ordered[-1] / per_ms]] if count else []


def fit_exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The b of the least-squares fit y = a * x**b; None unless two different x > 0 have a y > 0."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mid_x, mid_y = (sum(axis) / len(logs) for axis in zip(*logs))
    return float(sum((x - mid_x) * (y - mid_y) for x, y in logs) / sum((x - mid_x) ** 2 for x, _ in logs))


def sign_test(pairs: Iterable[tuple[float, float]]) -> float:
    """How probable it is that at least so many of the pairs differ in the same sense, if there is no difference."""
    signs = [one > other for one, other in pairs if one != other]
    rarer = min(signs.count(True), signs.count(False))
    return min(1.0, 2.0 * sum(math.comb(len(signs), n) for n in range(rarer + 1)) / 2.0 ** len(signs))


def parse_threshold(text: str) -> Threshold:
    """(measure, comparison, limit) of e.g. `p99>50ms`: limits in ms, a count, deliveries/s, or CPU ms per 1,000.

    Raises ValueError with one line that says what is wrong.
    """
    match = re.fullmatch(r"\s*([a-z][a-z0-9.]*)\s*([<>]=?)\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", text)
    if not match:
        raise ValueError(f"not a threshold: {text!r} (write it like 'p99>50ms', 'lost>0' or 'throughput<1000000')")
    measure, comparison, number, unit = match.groups()
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r} in {text!r} (known: {', '.join(MEASURES)})")
    if measure not in PERMILLE and unit:
        raise ValueError(f"{measure} takes no unit, but {text!r} has {unit!r}")
    if measure in PERMILLE and unit not in TIMES:
        raise ValueError(f"{measure} needs a unit, which in {text!r} must be one of {', '.join(TIMES)}")
    return measure, comparison, float(number) * TIMES.get(unit, 1.0)


def measured(measure: str, result: Result) -> float | None:
    """What `result` has for one of MEASURES, in the unit of its thresholds; None where not known."""
    value = _at(result, "latency", "corrected", measure)
    if measure == "throughput":
        value = result.get("deliveries_per_s")
    elif measure == "cpu":
        value = _at(result, "server", "cpu_ms_per_1000")
    elif measure == "lost":  # as the checker counted it: a duplicate does not make up for a loss
        value = next((check["count"] for check in _checks(result, "pass", "FAIL") if check["check"] == "loss"), None)
        expected, deliveries = result.get("expected"), result.get("deliveries")
        if value is None and expected is not None and deliveries is not None:
            value = max(0, expected - deliveries)
    return None if value is None else float(value)


def exceeded(threshold: Threshold, result: Result) -> bool:
    """Whether `result` is beyond the threshold. What is not known counts as exceeded: a gate must not open unseen."""
    measure, comparison, limit = threshold
    value = measured(measure, result)
    return value is None or bool(COMPARE[comparison](value, limit))


def _at(tree: Any, *path: str) -> Any:
    """What is at the end of the path of keys; None where any of it is missing or None."""
    for key in path:
        tree = (tree or {}).get(key)
    return tree


def _checks(result: Result, *verdicts: str) -> list[Result]:
    return [check for check in result.get("checks") or [] if check["verdict"] in verdicts]


# -----------------------------------------------------------------------------
# text report
# -----------------------------------------------------------------------------


def duration(ms: float, digits: int = 3) -> str:
    """A time for people, e.g. '510 us', '2.20 ms', '12.5 s'; with 0 digits as short as it is exact: '2 ms'."""
    rounded = float(f"{ms:.{digits or 6}g}")  # before the unit is chosen, so that 999.9 us is 1.00 ms
    unit = "s" if abs(rounded) >= 1000 else "ms" if abs(rounded) >= 1 or not rounded else "us"
    value = rounded / TIMES[unit]
    places = 0 if abs(value) >= 100 or not value else 1 if abs(value) >= 10 else 2
    return f"{value:,.{places}f} {unit}" if digits else f"{value:g} {unit}"


def count(number: float) -> str:
    """A number for people: thousands separated, decimals only where they matter."""
    return f"{number:,.0f}" if abs(number) >= 100 or number == int(number) else f"{number:.3g}"


def escape_controls(text: str) -> str:
    """`text` with what a terminal might obey made visible."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


FORMATS: dict[str, Callable[[Any], str]] = {
    "t": duration,
    "s": lambda seconds: duration(seconds * 1000),
    "n": count,
    "rate": lambda rate: f"{count(rate)} messages/s" if rate else "as fast as the server accepts",
    # What a server sent must not reach the terminal as it is.
    "": lambda text: escape_controls(str(text)),
}
HEADING = "loadtest {loadtest}; {when}; {machine[python]}; {machine[system]}; {machine[cpus]} CPUs"
# Label of an entry and its phrases: a phrase is left out where a value in it is not known, an entry where all are.
FACTS = {
    "command": "{command}",
    "fault": "{fault[name]}; {fault[what]}; peers {fault[peers]:n}",
    "target": "{target[name]}; {target[host]}:{target[port]}; {target[proto]}",
    "load": "{load[clients]:n} clients; {load[senders]:n} senders; {load[rate]:rate}; {load[size]:n} bytes",
    "run": "{load[duration_s]:n} s after {load[warmup_s]:n} s of warm-up; seed {load[seed]}",
    "join": "{join[connects_per_s]:n} connects/s; all joined in {join[all_joined_s]:s}; "
    "p50 {join[p50]:t}; p99 {join[p99]:t}",
    "reconnect": "all in again {reconnect[all_in_s]:s} after they were cut off; p50 {reconnect[p50]:t}; "
    "p99 {reconnect[p99]:t}; delivery steady after {reconnect[steady_s]:s}; "
    "delivery still slower than before after {reconnect[unsteady_s]:s}; "
    "delivered {reconnect[deliveries]:n} of {reconnect[expected]:n} to those who were in",
    "delivered": "{deliveries:n} of {expected:n}, each checked; from {sent:n} messages; in {elapsed_s:s}",
    "throughput": "{deliveries_per_s:n} deliveries/s; {messages_per_s:n} messages/s",
}
COSTS = {
    "fairness": "receivers' p50 {fairness[best]:t} to {fairness[worst]:t}; ratio {fairness[ratio]:.2f}; "
    "slowest {fairness[slowest]}",
    "server": "{server[cpu_ms_per_1000]:t} CPU per 1,000 deliveries; {server[cpu_s]:s} CPU; "
    "{server[rss_mb]:n} MB; {server[threads]:n} threads",
    "generator": "sent late by p50 {generator[late_p50]:t}; p99 {generator[late_p99]:t}; max {generator[late_max]:t}; "
    "{generator[cpu_share]:.0%} of a core",
    "floor": "p50 {generator[floor][p50]:t}; p99 {generator[floor][p99]:t} for the same load against a bare reflector",
}
# What became of disturbers, and how that is said, in so far as there were any.
FATES = {"connections": "connections", "stayed": "stayed", "written": "bytes sent", "answers": "answers"}


class _Phrases(string.Formatter):
    """str.format with FORMATS; raises LookupError or TypeError where a value is not known."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None or value == "":
            raise LookupError
        return FORMATS[format_spec](value) if format_spec in FORMATS else format(value, format_spec)


def _say(values: Result, phrases: str) -> str:
    """Those of the phrases (between semicolons) of which all values are known, with commas between."""
    said = []
    for phrase in phrases.split("; "):
        with contextlib.suppress(LookupError, TypeError):
            said.append(_Phrases().vformat(phrase, (), values))
    return ", ".join(said)


def _entry(label: str, text: str) -> list[str]:
    """`text` wrapped beside its label; nothing where there is no text."""
    first, others = label.ljust(LABEL), " " * LABEL
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _known(text: Callable[[float], str], value: Any) -> str:
    return "-" if value is None else text(value)


def _table(*rows: Sequence[str]) -> list[str]:
    """Columns as wide as their widest text, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def text_report(result: Result) -> str:
    """A result as one screen of text of at most 80 columns; its last line is the verdict, without a newline."""
    facts, costs = ([_entry(label, _say(result, table[label])) for label in table] for table in (FACTS, COSTS))
    limited = "LIMITED: these figures show the limits of the generator, not of the server"
    if _at(result, "generator", "limited"):
        costs.append(_entry("", limited + _say(result, ": {generator[why]}")))
    blocks = [
        textwrap.wrap(_say(result, HEADING), WIDTH),
        sum(facts, []),
        _latency_text(result),
        _histogram_text(result.get("histogram") or []),
        sum(costs, []),
        _checks_text(result),
        [_verdict_text(result)],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _latency_text(result: Result) -> list[str]:
    rows = [["latency", *PERMILLE, "samples"]]
    for name in ("corrected", "uncorrected", "complete", "undisturbed", "disturbed", "newcomers"):
        summary = _at(result, "latency", name)
        if summary and (summary.get("samples") or name != "complete"):
            times = [_known(duration, summary.get(percentile)).rjust(7) for percentile in PERMILLE]
            rows.append([name, *times, _known(count, summary.get("samples"))])
    return (_table(*rows) if rows[1:] else []) + _entry(
        "clock", _say(result, "{clock}; {timed[due]:n} of {deliveries:n} deliveries are timed")
    )


def _histogram_text(buckets: Sequence[Sequence[float]]) -> list[str]:
    """A bar for each bucket, neighbours merged until they fit; a dot is something, but less than half a mark."""
    step = -(-len(buckets) // HISTOGRAM_ROWS) or 1
    groups = [buckets[i : i + step] for i in range(0, len(buckets), step)]
    rows = [(group[-1][0], sum(bucket[1] for bucket in group)) for group in groups]
    total, longest = sum(number for _, number in rows), max((number for _, number in rows), default=0)
    lines = [f"{'corrected <=':>{LABEL}}{'deliveries':>13}{'share':>9}"] if total else []
    for upper, number in rows if total else []:
        bar = "#" * round(BAR * number / longest) or "." * bool(number)
        lines.append(f"{duration(upper):>{LABEL}}{count(number):>13}{number / total:>9.2%}  {bar}".rstrip())
    return lines


def _checks_text(result: Result) -> list[str]:
    """What passed in one line, every failure with its witness, and the thresholds."""
    said = []
    for verdict in ("pass", "skipped", "unknown"):
        named = [_say(check, "{check}") for check in _checks(result, verdict)]
        said += [f"{verdict}: {', '.join(named)}"] if named else []
    for check in _checks(result, "FAIL"):
        said.append("FAIL: " + _say(check, "{check}; {count:n} times"))
        said += [_say({"line": line}, "  {line}") for line in (check.get("witness") or "").split("\n")]
    lines = [line for i, text in enumerate(said) for line in _entry("" if i else "checks", text)]
    for i, threshold in enumerate(result.get("thresholds") or []):
        number = count if threshold["text"].strip().startswith(("throughput", "lost")) else duration
        value = "not known" if threshold["value"] is None else number(threshold["value"])
        verdict = "EXCEEDED" if threshold["exceeded"] else "not exceeded"
        lines += _entry("" if i else "thresholds", f"{_say(threshold, '{text}')} {verdict}: {value}")
    return lines


def _verdict_text(result: Result) -> str:
    """One line: the verdict, and what it rests on."""
    verdict = result.get("verdict") or "UNKNOWN"
    over = [threshold for threshold in result.get("thresholds") or [] if threshold["exceeded"]]
    told = [_say(check, "{check} {count:n}") or _say(check, "{check}") for check in _checks(result, "FAIL")]
    told += [_say(threshold, "exceeded {text}") for threshold in over]
    if not told and verdict == "PASS":
        passed = [check["check"] for check in _checks(result, "pass")]
        told = [words for name, words in PROMISES.items() if name in passed]
    elif not told:
        told = [_say(check, "not known: {check}") for check in _checks(result, "unknown")]
    told = [*_lacking_text(result), *told]
    if result.get("deliveries") == 0:
        told = ["nothing was received"]
    else:
        told.insert(0, _say(result, "{deliveries:n} of {expected:n} deliveries"))
    line = f"{verdict}  {', '.join(filter(None, told))}".rstrip()
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _lacking_text(result: Result) -> list[str]:
    """What was not tried or not heard, in the words of a verdict."""
    never = (result.get("scheduled") or 0) - (result.get("sent") or 0)
    said = [f"{count(never)} of {count(result['scheduled'])} messages never sent"] if never > 0 else []
    said += [_say(result, "throttled to {throttled:n} messages/s")]
    return said + [_say(result, "{disconnected:n} clients disconnected")] * bool(result.get("disconnected"))


def sweep_text(sweep: Result) -> str:
    """How latency and cost grow with the number of clients, as a table."""
    texts: Sequence[Callable[[float], str]] = (count, duration, duration, duration, count)
    rows = [[_known(text, value) for text, value in zip(texts, point)] for point in sweep["points"]]
    limited = [bool(point[5:] and point[5]) for point in sweep["points"]]
    rows = [[*row, "*" * mark] if any(limited) else row for row, mark in zip(rows, limited)]
    head = ["clients", "p50", "p99", "CPU/1,000 deliveries", "deliveries/s", *[""] * any(limited)]
    lines = [line.rstrip() for line in _table(head, *rows)]
    grows = _say(sweep, "the server's CPU per message grows as clients^{exponent:.2f}")
    note = "* LIMITED by the load tester itself" if any(limited) else ""
    return "\n".join(filter(None, [*lines, note, grows]))


def versus_text(document: Result) -> str:
    """The medians of both targets over their rounds, each with the range of the rounds, and their ratio, as a table."""
    versus = document["versus"]
    names = [_say({"name": name}, "{name}") for name in versus["names"]]
    rows = [["median, range", *names, "ratio", "sign test"]]
    for measure, (*targets, ratio) in versus["figures"].items():
        label = {"throughput": "deliveries/s", "cpu": "CPU/1,000"}.get(measure, measure)
        shown = count if measure == "throughput" else duration
        for i, name in enumerate((label, "  lowest", "  highest")):
            values = [_known(shown, figure[i]) for figure in targets] + [_known("{:.2f}".format, ratio[i])]
            rows.append([name, *values, _known(_significance, _at(versus, "p", measure)) if i == 0 else ""])
    rounds = _say(versus, ", medians of {rounds:n} rounds")
    told = f"ratio: {' / '.join(names)}{rounds}; noise: a sign test over the rounds gives p > {SIGNIFICANT:g}"
    limited = "; LIMITED by the load tester itself" if any(map(_limited, document["results"])) else ""
    return "\n".join([*(line.rstrip() for line in _table(*rows)), *textwrap.wrap(told + limited, WIDTH)])


def _significance(p: float) -> str:
    return f"p {p:.2g}" if p <= SIGNIFICANT else f"noise, p {p:.2g}"


def _limited(result: Result) -> bool:
    return bool(_at(result, "generator", "limited"))


def faults_text(rows: Sequence[Result]) -> str:
    """What each fault did to the others, what became of those who did it, and whether that is good, as a table."""
    lines = [["fault", "peers", "lost", "wrong", "p99 undisturbed", "disturbed", "ratio", "newcomers"]]
    for row in rows:
        before, since, anew = (_known(duration, row[key]) for key in ("undisturbed", "disturbed", "newcomers"))
        counts = [count(row[key]) for key in ("peers", "lost", "wrong")]
        lines.append([row["name"], *counts, before, since, _known("{:.2f}".format, row["ratio"]), anew])
    head, *table = _table(*lines)
    said = [head]
    for line, row in zip(table, rows):
        limited = "; LIMITED by the load tester itself" if row["limited"] else ""
        what = f"{row['verdict']}: {row['what']}: {fate_text(row['fate'])}{limited}"
        said += ["", line, *textwrap.wrap(what, WIDTH)]
    good = [row for row in rows if row["verdict"] == "PASS"]
    bounds = f"p99 at most {duration(FAULT_P99_MS, 0)} or {FAULT_RATIO:g} times that of before"
    total = f"{worst(row['verdict'] for row in rows)}  {len(good)} of {len(rows)} kinds of fault within bounds: "
    total += f"nothing lost or wrong, {bounds}, newcomers' p99 at most {duration(FAULT_NEWCOMERS_MS, 0)}"
    return "\n".join([*said, "", *textwrap.wrap(total, WIDTH)])


def worst(verdicts: Iterable[str]) -> str:
    """Of several verdicts the one that says what all are worth."""
    return min(verdicts, key=("FAIL", "INTERRUPTED", "UNKNOWN", "PASS").index, default="UNKNOWN")


def fault_verdict(row: Result, verdicts: Sequence[str]) -> str:
    """Whether what a fault did is within bounds; times that the load tester may have spoilt are not known to be not."""
    before = worst(verdicts)
    if row["lost"] or row["wrong"] or before != "PASS":
        return "FAIL" if row["lost"] or row["wrong"] else before
    if None in (row["disturbed"], row["newcomers"]):
        return "UNKNOWN"
    slow = row["disturbed"] > max(FAULT_P99_MS, FAULT_RATIO * (row["undisturbed"] or 0.0))
    if slow or row["newcomers"] > FAULT_NEWCOMERS_MS:
        return "UNKNOWN" if row["limited"] else "FAIL"
    return "PASS"


def hdr_text(result: Result) -> str:
    """The corrected latencies as HdrHistogram's percentile distribution, for its plotter; those not known are out."""
    total = _at(result, "latency", "corrected", "samples") or 0
    lines = [f"{'Value':>12} {'Percentile':>14} {'TotalCount':>10} {'1/(1-Percentile)':>14}", ""]
    for quantile, value in result.get("curve") or []:
        inverse = f" {1 / (1 - quantile):14.2f}" if quantile < 1 else ""
        lines.append(f"{value:12.3f} {quantile:2.12f} {round(quantile * total):10}{inverse}")
    worst_ms = _at(result, "latency", "corrected", "max") or 0.0
    lines += [f"#[Max     = {worst_ms:12.3f}, Total count    = {total:12}]", "#[Values in milliseconds]"]
    return "\n".join(lines) + "\n"


OPENMETRICS = (  # name, unit, help, path of the value
    ("loadtest_deliveries", "", "Messages received, once by each receiver.", ("deliveries",)),
    ("loadtest_expected", "", "Messages that receivers should have had.", ("expected",)),
    ("loadtest_deliveries_per_second", "", "Throughput.", ("deliveries_per_s",)),
    ("loadtest_server_cpu_seconds", "seconds", "CPU time of the server.", ("server", "cpu_s")),
    ("loadtest_passed", "", "1 if the verdict is PASS, else 0.", ("passed",)),
    ("loadtest_limited", "", "1 if the load tester itself was the limit.", ("generator", "limited")),
)


def openmetrics_text(results: Sequence[Result]) -> str:
    """The results as OpenMetrics text, each with its target, clients and place among the results as labels."""
    labels, lines = [], []
    for i, result in enumerate(results):
        name = re.sub(r'([\\"])', r"\\\1", _say(result, "{target[name]}")).replace("\n", r"\n")
        labels.append(f'target="{name}",clients="{_at(result, "load", "clients")}",run="{i + 1}"')
    family = "loadtest_latency_seconds"
    lines += [f"# TYPE {family} summary", f"# UNIT {family} seconds", f"# HELP {family} From due to arrival."]
    for label, result in zip(labels, results):
        summary = _at(result, "latency", "corrected") or {}
        for percentile, permille in PERMILLE.items():
            if summary.get(percentile) is not None:
                quantile = f'{label},quantile="{permille / 1000:g}"'
                lines.append(f"{family}{{{quantile}}} {summary[percentile] / 1000:.9g}")
        lines.append(f"{family}_count{{{label}}} {summary.get('samples') or 0}")
    for family, unit, told, path in OPENMETRICS:
        lines += [f"# TYPE {family} gauge", *[f"# UNIT {family} {unit}"] * bool(unit), f"# HELP {family} {told}"]
        for label, result in zip(labels, results):
            value = _at({**result, "passed": result.get("verdict") == "PASS"}, *path)
            lines += [f"{family}{{{label}}} {float(value):.9g}"] if value is not None else []
    return "\n".join([*lines, "# EOF", ""])


def fate_text(fate: Result | None) -> str:
    """What became of the disturbers of a run, in one sentence."""
    if not fate:
        return "not known"
    said = [f"{words} {count(fate[key])}" for key, words in FATES.items() if fate[key]]
    for words, times, seconds in fate["closed"]:
        after = "" if seconds is None else f" after {duration(seconds * 1000)}"
        said.append(f"closed {count(times)}{after} ({escape_controls(words)})")
    said.append(_say(fate, "they took {cpu_share:.0%} of a core"))
    return ", ".join(said)


# -----------------------------------------------------------------------------
# HTML report
# -----------------------------------------------------------------------------

CSS = """
:root { color-scheme: light dark; --fg: #1c1e21; --bg: #fff; --grid: #d9dce0; --soft: #f4f5f7;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0568c; --c4: #b38600; --c5: #555b66;
  --c6: #c1272d; --c7: #5b4fc4; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e6ea; --bg: #15171a; --grid: #3a3e45; --soft: #1f2226;
  --c0: #56b4e9; --c1: #ff8a3d; --c2: #2fc99a; --c3: #e79ac6; --c4: #f0c94a; --c5: #aab0bb;
  --c6: #ff6b6b; --c7: #a79bff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 50rem;
  margin: 2rem auto; padding: 0 1rem; }
pre { font: 13px/1.4 ui-monospace, monospace; background: var(--soft); padding: 1rem; overflow-x: auto; }
@media (max-width: 46rem) { pre { white-space: pre-wrap; overflow-wrap: anywhere; } }
h1, h2 { overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } svg { width: 100%; max-width: 30rem; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--fg); }
.grid { stroke: var(--grid); } .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.limited { fill: var(--bg); stroke: var(--fg); } dt { float: left; width: 8rem; } dd { margin: 0 0 0 8rem; }
.legend span { margin-right: 1.2em; } .legend b { margin-right: .4em; }
"""
SIZE = (360, 280)  # of a chart, in its own units: pixels of a phone; the margins hold the labels of its axes
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 10, 50
COLOURS = 8  # --c0 to --c7 above


class _Axis(NamedTuple):
    """One axis of a chart: values from `low` to `high` lie on units of the chart from `start` to `end`."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    start: float = LEFT
    end: float = SIZE[0] - RIGHT

    def at(self, value: float) -> float:
        return self.start + (max(value, self.low) - self.low) / (self.high - self.low) * (self.end - self.start)


def html_report(document: Result) -> str:
    """The whole document as one page that needs no network and no script, in light or dark as the reader has it."""
    results, sweep = document["results"], document.get("sweep")
    names = _names(results)
    parts = [_summary(results), _curve_figure(names, results)]
    if sweep:
        parts += ["<h2>Sweep</h2>", *_sweep_figures(sweep), _pre(sweep_text(sweep))]
    if document.get("faults"):
        parts += ["<h2>Faults</h2>", _pre(faults_text(document["faults"]))]
    if document.get("versus"):
        parts += ["<h2>Versus</h2>", _pre(versus_text(document))]
    for name, result in zip(names, results):
        parts += [f"<h2>{html.escape(name)}</h2>", _pre(text_report(result)), _time_figure(name, result)]
    title = html.escape("loadtest: " + ", ".join(dict.fromkeys(_say(result, "{target[name]}") for result in results)))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(filter(None, [f"<h1>{title}</h1>", *parts]))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{CSS}</style></head>\n<body>\n{body}\n</body></html>\n'


def _target(result: Result) -> str:
    return _say(result, "{target[name]}") or "target"


def _summary(results: Sequence[Result]) -> str:
    """The verdict on all, and four figures: each for each target, of all its results the worst."""
    parts = [f"<p><strong>{worst(result.get('verdict') or 'UNKNOWN' for result in results)}</strong></p>"]
    for target in dict.fromkeys(map(_target, results)):
        parts.append(f"<h3>{html.escape(target)}</h3><dl>")
        own = [result for result in results if _target(result) == target]
        for measure, label in (("p50", "p50"), ("p99", "p99"), ("throughput", "deliveries/s"), ("lost", "lost")):
            values = [measured(measure, result) for result in own]
            known = [value for value in values if value is not None]
            chosen = (
                None if len(known) < len(values) else (min if measure == "throughput" else max)(known, default=None)
            )
            shown = _known(duration if measure in PERMILLE else count, chosen)
            parts.append(f"<dt>{label}</dt><dd>{shown}</dd>")
        parts.append("</dl>")
    note = "<p>Of several runs the worst is shown.</p>" if len(results) > len({*map(_target, results)}) else ""
    return "".join(parts) + note


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _names(results: Sequence[Result]) -> list[str]:
    """A name for each result that tells it from the others: target, clients where they differ, a number if need be."""
    sizes = {_at(result, "load", "clients") for result in results}
    phrases = "{target[name]}; {fault[name]}" + "; {load[clients]:n} clients" * (len(sizes) > 1)
    names = [_say(result, phrases) or "target" for result in results]
    return [name if names.count(name) == 1 else f"{name} #{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def _curve_figure(names: Sequence[str], results: Sequence[Result]) -> str:
    lines = [(name, _tail_points(result.get("curve") or [])) for name, result in zip(names, results)]
    targets = list(map(_target, results))
    colours = [[*dict.fromkeys(targets)].index(name) for name in targets] if len({*targets}) > 1 else []
    nines = max((x for _, points in lines for x, _ in points), default=0.0)
    labels = ((n, f"{100 - 100 / 10**n:.{max(0, n - 2)}f}%") for n in range(1, int(nines + 1e-9) + 1))
    ticks = [(math.log10(2), "50%"), *labels]
    x = _Axis("percentile of deliveries, logarithmic", 0, max(1.0, nines), ticks)
    return _figure("Latency by percentile", x, lines, colours)


def _tail_points(points: Sequence[Sequence[float]]) -> Points:
    """Quantile q at -log10(1 - q), the number of nines. The maximum (q = 1) stands a little beyond the last of them."""
    found: Points = [(-math.log10(1 - q), value) for q, value in points if q < 1]
    beyond = max((x for x, _ in found), default=0.0) + 0.1
    return found + [(beyond, value) for q, value in points if q >= 1]


def _time_figure(name: str, result: Result) -> str:
    rows = result.get("over_time") or [[0, None, None, None]]
    lines: list[tuple[str, Points]] = []
    for i, measure in enumerate(("p50", "p99", "max"), 1):
        lines.append((measure, [(row[0], row[i]) for row in rows]))
    low, high = int(rows[0][0]), int(rows[-1][0])
    step = next(n * 10**power for power in range(9) for n in (1, 2, 5) if n * 10**power * 6 >= high - low)
    ticks = [(tick, count(tick)) for tick in range(low, high + 1) if tick % step == 0]
    return _figure(f"Latency over time, {name}", _Axis("time in seconds", low, max(high, low + 1), ticks), lines)


def _sweep_figures(sweep: Result) -> list[str]:
    """Latency, and in a chart of its own what it costs, by the number of clients; LIMITED points have a ring."""
    points = sorted(sweep["points"], key=lambda point: float(point[0]))
    xs = [math.log10(point[0]) for point in points]
    low, high = (xs[0], max(xs[-1], xs[0] + 0.1)) if xs else (0.0, 1.0)
    ticks: list[tuple[float, str]] = []
    for x, point in zip(xs, points):
        if not ticks or x - ticks[-1][0] >= (high - low) / 7:  # nearer ones would overlap
            ticks.append((x, count(point[0])))
    axis = _Axis("clients, logarithmic", low, high, ticks)
    rings = [x for x, point in zip(xs, points) if point[5:] and point[5]]
    latency, cost = (
        [(label, list(zip(xs, (point[i] for point in points)))) for i, label in labels]
        for labels in (((1, "p50"), (2, "p99")), ((3, "CPU per 1,000 deliveries"),))
    )
    return [
        _figure("Latency by clients", axis, latency, rings=rings),
        _figure("Cost by clients", axis, cost, rings=rings, unit="CPU time"),
    ]


def _figure(
    title: str,
    x: _Axis,
    lines: Sequence[tuple[str, Points]],
    colours: Sequence[int] = (),  # of each line, where not each has its own
    rings: Sequence[float] = (),  # where points are marked as LIMITED
    unit: str = "latency",
) -> str:
    """A chart of times in ms over `x` with its legend; nothing where there is nothing to draw."""
    values = [value for _, points in lines for _, value in points if value is not None]
    if not values:
        return ""
    y, name = _ms_axis(values), html.escape(title)
    legend, paths = "", ""
    for i, (label, points) in enumerate(lines):
        colour = f"var(--c{(colours[i] if colours else i) % COLOURS})"
        legend += f'<span><b style="color: {colour}">&#9644;</b>{html.escape(label)}</span> '
        paths += f'<path class="line" style="stroke: {colour}" d="{_path(points, x, y)}"/>'
        for across, value in points:
            if across in rings and value is not None:
                paths += f'<circle class="limited" cx="{x.at(across):.1f}" cy="{_height(value, y):.1f}" r="4"/>'
    legend += "<span>&#9675; LIMITED by the load tester itself</span>" if rings else ""
    caption = f'<figcaption><strong>{name}</strong><div class="legend">{legend}</div></figcaption>'
    svg = f'<svg viewBox="0 0 {SIZE[0]} {SIZE[1]}" role="img" aria-label="{name}">{_grid(x, y, unit)}{paths}</svg>'
    return f"<figure>{caption}{svg}</figure>"


def _height(value: float, y: _Axis) -> float:
    return y.at(math.log10(max(value, 1e-9)))


def _ms_axis(values: Sequence[float]) -> _Axis:
    """A logarithmic axis from and to a round number; what is below a microsecond is drawn at it."""
    rounds = [float(f"{n}e{power}") for power in range(-3, 10) for n in (1, 2, 5)]
    first = max(bisect_right(rounds, min(values)) - 1, 0)
    shown = rounds[first : max(bisect_left(rounds, max(values)), first + 1) + 1]
    labelled = [ms for ms in shown if len(shown) <= 9 or f"{ms:e}".startswith("1")]
    ticks = [(math.log10(ms), duration(ms, 0)) for ms in labelled]
    return _Axis("", math.log10(shown[0]), math.log10(shown[-1]), ticks, SIZE[1] - BOTTOM, TOP)


def _path(points: Points, x: _Axis, y: _Axis) -> str:
    """The points as SVG path data; the line is broken at a gap, and a point alone is a dot (h0 with round caps)."""
    steps, pen = [], "M"
    for across, value in points:
        if value is not None:
            steps.append(f"{pen}{x.at(across):.1f} {_height(value, y):.1f}" + "h0" * (pen == "M"))
        pen = "M" if value is None else "L"
    return "".join(steps)


def _grid(x: _Axis, y: _Axis, unit: str) -> str:
    """Grid lines with their labels; these texts are this program's own and need no escaping."""
    parts = []
    for at, label in ((x.at(tick), label) for tick, label in x.ticks):
        parts.append(f'<path class="grid" d="M{at:.1f} {y.start}V{y.end}"/>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 18}" text-anchor="middle">{label}</text>')
    for at, label in ((y.at(tick), label) for tick, label in y.ticks):
        parts.append(f'<path class="grid" d="M{x.start} {at:.1f}H{x.end}"/>')
        parts.append(f'<text x="{x.start - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    title = f'<text x="{(x.start + x.end) / 2}" y="{y.start + 40}" text-anchor="middle">{x.title}</text>'
    turned = f'transform="translate(14 {(y.start + y.end) / 2}) rotate(-90)"'
    return "".join(parts) + title + f'<text {turned} text-anchor="middle">{unit}, logarithmic</text>'


# -----------------------------------------------------------------------------
# server under test
# -----------------------------------------------------------------------------


Server = Tuple[str, int]  # host and port


class Target:
    """A server to test: one that is there, or one that is started, and stopped by `stop`.

    `others` are linked with it: clients are spread over all of them. A command may hold {port}, for which a free port
    is put in. Raises FatalError where nothing listens within START_S.
    """

    def __init__(
        self, host: str, port: int, command: list[str] | None = None, pid: int = 0, others: Sequence[Server] = ()
    ) -> None:
        self.host, self.port, self.pid, self.others = host, port, pid, others
        here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
        programs = [word.replace(here, "") for word in command or [] if word.endswith(".py")]
        address = " + ".join(f"{host}:{port}" for host, port in self.servers())
        self.name = (programs or [os.path.basename(word) for word in command or []] or [address])[0]
        self._process: subprocess.Popen[bytes] | None = None
        if command:
            try:
                self._start(command)
            except BaseException:
                self.stop()
                raise

    def _start(self, command: list[str]) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        filled = [word.replace("{port}", str(self.port)) for word in command]
        try:
            self._process = subprocess.Popen(
                filled,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise FatalError(f"cannot start {filled[0]}: {error.strerror}") from None
        self.pid = self._process.pid
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 1.0):
                return
            time.sleep(0.05)
        code = self._process.poll()
        ended = "" if code is None else f"; it ended with {code}"
        raise FatalError(
            f"{' '.join(filled)} does not listen on port {self.port} (as {{port}} in the command says){ended}"
        )

    def servers(self) -> list[Server]:
        """Where clients can join."""
        return [(self.host, self.port), *self.others]

    def stop(self) -> None:
        """Ends the server and all that it started in its process group, if it is ours."""
        end = time.monotonic() + STOP_S
        try:
            self._signal(signal.SIGTERM)
            while self._signal(0) and time.monotonic() < end:
                time.sleep(STOP_LOOK_S)
        finally:
            self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            if self._process:
                self._process.wait()

    def _signal(self, number: int) -> bool:
        """Signals the process group, where there are such; whether anything of it lives."""
        if self._process is None:
            return False
        ended = self._process.poll() is not None  # what it started may live on, and only then is the number still its
        with contextlib.suppress(OSError):
            if sys.platform != "win32":
                os.killpg(self.pid, number)
                return True
            if number:
                self._process.terminate()
        return sys.platform == "win32" and not ended

    def usage(self) -> dict[str, float] | None:
        """CPU seconds so far, resident MB and threads of the server's process; None where that cannot be seen."""
        if sys.platform == "win32" or not self.pid or not os.path.exists(f"/proc/{self.pid}/stat"):
            return None
        with open(f"/proc/{self.pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # from field 3 of proc(5) on
        ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        return {
            "cpu_s": (int(fields[11]) + int(fields[12])) / ticks,
            "threads": int(fields[17]),
            "rss_mb": int(fields[21]) * page / 1e6,
        }


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -----------------------------------------------------------------------------
# clients
# -----------------------------------------------------------------------------


T = TypeVar("T")
REFUSED = re.compile(
    rb"(?:^|\n)(?::[^ \n]+ (?:43[237]|40[35]|46[45]|47\d) |(?::[^ \n]+ )?ERROR |\*\*\* Error|"
    rb'\{"type": ?"error")[^\n]*\n'
)
RANKS = b"~&@%+"  # before a name there


class Chunk(NamedTuple):
    """What one read brought."""

    moment: int  # ns: when the last byte of it arrived
    first: int  # from `first` to `last` in the order of arrival
    last: int
    exact: bool  # nothing was waiting before, so that this is the time of all of it


class Connection:
    """One that joins, and may leave again."""

    def __init__(self, run: Run, number: int) -> None:
        self.run, self.number, self.name = run, number, f"{run.prefix}{number}"
        self.joined_s, self.joined_ns = 0.0, 0  # how long it took, and when it was done
        self._family, self.address = run.addresses[number % len(run.addresses)]
        self.sock = socket.socket(self._family, socket.SOCK_STREAM)
        self.lock = threading.Lock()  # of sending: a client's sender and its answers to PING
        self._rest = b""

    def send(self, data: bytes) -> None:
        """Sends a line, whoever else sends."""
        with self.lock:
            self.sock.sendall(data)

    def visit(self) -> float:
        """Joins and leaves; returns the seconds until it had joined, or JOIN_S where it could not."""
        with self.sock, contextlib.suppress(OSError):
            self._connect()
            self.send(f"PART {self.run.channel}\r\nQUIT\r\n".encode())
        return self.joined_s or JOIN_S

    def _come(self) -> None:
        """Joins; where all come at once, tries again for a while: its name may still be taken, or the server busy."""
        end = time.monotonic() + JOIN_S
        while not self.joined_s:
            try:
                self._connect()
            except OSError:
                if not self.run.insists or self.run.stopping or time.monotonic() > end:
                    raise
                self.sock.close()
                time.sleep(RETRY_S)
                self.sock, self._rest = socket.socket(self._family, socket.SOCK_STREAM), b""

    def _connect(self) -> None:
        began = time.monotonic()
        self.sock.settimeout(JOIN_S)
        self.sock.connect(self.address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._set_up()
        self._rest = getattr(self, f"_join_{self.run.wire.protocol}")()
        self.joined_ns = now_ns()
        self.joined_s = time.monotonic() - began

    def _set_up(self) -> None:
        if KERNEL_CLOCK:
            self.sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)

    def _join_irc(self) -> bytes:
        password = f"PASS {self.run.password}\r\n" if self.run.password else ""
        self.sock.sendall(f"{password}NICK {self.name}\r\nUSER {self.name} 0 * :{self.name}\r\n".encode())
        rest = self._expect(rb"(?:@[^ ]* )?:[^ ]+ 001 [^\n]*\n", b"")
        self.sock.sendall(f"JOIN {self.run.channel}\r\nPING joined\r\n".encode())
        rest = self._expect(rb"(?:@[^ ]* )?:[^ ]+ 366 [^\n]*\n", rest)
        return self._expect(rb"(?:@[^ ]* )?:[^ ]+ PONG [^\n]*\n", rest)  # after what was said before this run

    def _join_plain(self) -> bytes:
        self.sock.sendall(f"{self.name}\n".encode())
        rest = self._expect(rb"\*\*\* " + self.name.encode() + rb" joined[^\n]*\n", b"")
        self.send(b"/topic\n")
        return self._expect(rb"\*\*\* (?:The topic of #|#[^ \n]+ has no topic)[^\n]*\n", rest)

    def _join_json(self) -> bytes:
        item = {"type": "join", "user": self.name, "channel": self.run.channel}
        if self.run.password:
            item["password"] = self.run.password
        self.sock.sendall(self.run.wire.wrap(f"{json.dumps(item)}\n".encode()))
        rest = self._expect(rb'[^\n]*"join"[^\n]*"' + self.name.encode() + rb'"[^\n]*\n', b"")
        self.send(self.run.wire.wrap(b'{"type": "command", "text": "/topic"}\n'))
        return self._expect(rb'[^\n]*"event": ?"(?:no-)?topic"[^\n]*\n', rest)

    def _join_ws(self) -> bytes:
        key = base64.b64encode(os.urandom(16))
        self.sock.sendall(upgrade_request(self.address, str(key, "ascii")).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            more = self.sock.recv(65536)
            if not more:
                raise OSError(last_line(head))
            head += more
        head, _, self._rest = head.partition(b"\r\n\r\n")
        accept = base64.b64encode(hashlib.sha1(key + WEBSOCKET_GUID).digest())
        if not head.startswith(b"HTTP/1.1 101 ") or b"sec-websocket-accept: " + accept.lower() not in head.lower():
            raise OSError(f"no WebSocket: {str(head.splitlines()[0], 'latin-1')}")
        self._join_json()  # what it leaves is of before the run
        return self._rest

    def _more(self) -> bytes:
        """What comes next while joining, as lines; b'' at the end."""
        data = self.sock.recv(65536)
        if not self.run.wire.framed or not data:
            return data
        frames, self._rest = split_frames(self._rest + data)
        return b"".join(self.run.wire.bare(frame) + b"\n" for frame in frames) or self._more()

    def _expect(self, wanted: bytes, data: bytes) -> bytes:
        """Reads until a line comes that matches, and returns what follows it; raises OSError for a refusal."""
        found, answered = re.search(rb"(?:^|\n)" + wanted, data), 0
        while not found:
            more = self._more()
            if not more:
                raise OSError(last_line(data))
            data += more
            whole = data.rfind(b"\n") + 1
            self._answer_pings(data[answered:whole])
            answered = whole
            found = re.search(rb"(?:^|\n)" + wanted, data)
            refused = REFUSED.search(data)
            if refused and not found:
                raise OSError(last_line(refused[0]))
        mapping = re.search(rb" 005 [^\n]* CASEMAPPING=([a-z0-9-]+)", data)
        if mapping:
            self.run.wire.fold = folding(str(mapping[1], "ascii"))
        return data[found.end() :]

    def _answer_pings(self, data: bytes) -> None:
        for token in re.findall(rb"(?:^|\n)PING ([^\r\n]*)", data):
            self.send(b"PONG " + token + b"\r\n")


class Client(Connection):
    """A connection in a thread of its own: joins, then stores what arrives, until it is told to stop.

    Only the numbers of the lines and the time of each chunk are kept. While the client is watched, the thread wakes
    for every chunk, so that the time belongs to what is in it; otherwise it reads now and then, to leave the
    processor to the server.
    """

    def __init__(self, run: Run, number: int) -> None:
        super().__init__(run, number)
        self.order = array("I")  # numbers of lines in the order of arrival
        self.others = array("I")  # places in `order` of those that are no messages
        self.chunks: list[Chunk] = []
        self.settled = -1  # the place in `order` from which on lines belong to the run
        self.failure = ""
        self.slow = False  # it had not read all that was there when its connection ended
        self.present: set[bytes] = set()  # who is in the channel, as far as it has asked
        always = run.turns.of(number) if run.turns.groups == 1 else ()
        self.watch = Watch(always, run.due_between, self.order, run.read_every)  # until the run begins

    def live(self) -> None:
        """The thread."""
        try:
            self._come()
            self.run.joined.release()
            self._receive()
        except OSError as error:
            self.failure = "" if self.run.stopping else self.failure or error.strerror or str(error)
        finally:
            if self.settled < 0:  # somebody waits for it
                (self.run.all_settled if self.joined_s else self.run.joined).release()
            self.sock.close()

    def stop(self) -> None:
        """Makes the thread end."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def delivered(self) -> int:
        """Messages received so far."""
        return len(self.order) - len(self.others)

    def other_lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines that are no messages, each with its place in `order`."""
        for place in self.others:
            yield place, self.run.lines.others[self.order[place]]

    def _receive(self) -> None:
        self.sock.settimeout(None)
        if self._rest:
            rest, self._rest = self._rest, b""
            self._store(rest)
        run, awake, self.slow = self.run, False, False
        while not run.stopping:
            pause = self.watch.pause(now_ns())
            if pause and not self.slow:
                time.sleep(pause)
            # A client that begins to watch first takes what has piled up. From then on it waits with nothing to
            # read, and the time of a chunk is that of the lines in it.
            data, moment = self._chunk(wait=awake and not pause)
            if run.stopping or data == b"":
                break
            awake = not pause and (awake or not data)
            self.slow = data is not None and len(data) == RECV_BYTES
            if data:
                start = len(self.order)
                self._store(data)
                if len(self.order) > start:
                    self.chunks.append(Chunk(moment or now_ns(), start, len(self.order), awake))
        if not run.stopping:
            self.failure = self.failure or "the connection was closed"

    def _chunk(self, wait: bool) -> tuple[bytes | None, int]:
        """The next bytes (b'' at the end), and when they arrived in ns or 0; None when nothing is there to wait for."""
        if not (wait or DONTWAIT or select.select([self.sock], [], [], 0)[0]):
            return None, 0
        try:
            if sys.platform == "win32" or not KERNEL_CLOCK:
                return self.sock.recv(RECV_BYTES, 0 if wait else DONTWAIT), now_ns()
            data, ancillary, _, _ = self.sock.recvmsg(RECV_BYTES, 64, 0 if wait else DONTWAIT)
        except BlockingIOError:
            return None, 0
        if not ancillary:  # as for the first chunk of a connection
            return data, 0
        seconds, nanoseconds = struct.unpack_from("@ll", ancillary[0][2])
        return data, seconds * 1_000_000_000 + nanoseconds

    def _store(self, data: bytes) -> None:
        """Keeps the numbers of all whole lines in `data`."""
        lines, self._rest = self.run.wire.split(self._rest + data)
        if len(self._rest) > MAX_LINE_BYTES:
            lines.append(self._rest[:MAX_LINE_BYTES])
            self._rest = b""
        found = list(map(self.run.lines.__getitem__, lines))
        start = len(self.order)
        greatest = max(found, default=0)
        if greatest >= OTHERS:
            self.others.extend(place for place, number in enumerate(found, start) if number >= OTHERS)
        self.order.extend(found)
        for i, number in enumerate(found) if greatest >= HEEDED else ():
            if number >= HEEDED:
                self._heed(start + i, self.run.lines.others[number])

    def _heed(self, place: int, line: bytes) -> None:
        """Acts on a line that is no message."""
        framed = self.run.wire.framed
        ping = (PING_FRAME if framed else PING).fullmatch(line)
        if ping:
            with contextlib.suppress(OSError):  # there may be last words to read
                self.send(masked_frame(PONG_OPCODE, ping[1]) if framed else b"PONG " + ping[1] + b"\r\n")
        elif self.settled < 0:
            names = NAMES.fullmatch(line)
            self.present.update(name.lstrip(RANKS) for name in (names[1] if names else b"").split())
            if self.run.settling and self.run.wire.settled.fullmatch(line):
                self.settled = place + 1
                self.run.all_settled.release()


class TlsClient(Client):
    """A client whose connection is encrypted, so that the clock is that of recv. The certificate is not verified.

    Two threads must not use one TLS connection at once: calls are non-blocking and under the lock, waiting is not.
    """

    def send(self, data: bytes) -> None:
        """Sends a line, whoever else sends or receives."""
        while data:
            sent = self._try(partial(self.sock.send, data))
            data = data[sent or 0 :]

    def stop(self) -> None:
        """Makes the thread end, within TLS_WAIT_S."""

    def _set_up(self) -> None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.sock = context.wrap_socket(self.sock)

    def _chunk(self, wait: bool) -> tuple[bytes | None, int]:
        self.sock.setblocking(False)
        return self._try(partial(self.sock.recv, RECV_BYTES)), now_ns()

    def _try(self, call: Callable[[], T]) -> T | None:
        """What the call returns; None after some waiting when it could not be done yet."""
        try:
            with self.lock:
                return call()
        except ssl.SSLWantReadError:
            writing = False
        except ssl.SSLWantWriteError:
            writing = True
        with selectors.DefaultSelector() as selector:
            selector.register(self.sock, selectors.EVENT_WRITE if writing else selectors.EVENT_READ)
            selector.select(TLS_WAIT_S)
        return None


def last_line(data: bytes) -> str:
    """What the last line of all that a server said tells of why it closes a connection, in any protocol."""
    lines = [data] if data.startswith(b"\x88") else data.strip().splitlines()
    line = (lines or [b"the connection was closed"])[-1]
    match = LAST_WORDS.fullmatch(line)
    said = next(filter(None, match.groups()), line) if match else line
    return str(said, "utf-8", "replace")


def upgrade_request(address: Any, key: str) -> str:
    """What begins WebSocket at an address."""
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return (
        f"GET / HTTP/1.1\r\nHost: {host}:{address[1]}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    )


def with_hint(reason: str, hints: dict[str, str] = HINTS) -> str:
    """Why a server let somebody down, with the setting that lifts that, where one is known."""
    hint = next((hint for word, hint in hints.items() if word in reason.lower()), "")
    return f"{escape_controls(reason)} (perhaps {hint})" if hint else escape_controls(reason)


# -----------------------------------------------------------------------------
# run
# -----------------------------------------------------------------------------


class Load(NamedTuple):
    """What is done to a server."""

    clients: int
    senders: int
    rate: float  # messages/s over all senders; 0: as fast as the server accepts
    duration_s: float
    warmup_s: float
    size: int  # bytes of a text
    seed: int
    protocol: str
    channel: str
    password: str
    connect_rate: float
    tls: bool


def wait_until(due: int) -> int:
    """Returns at `due` (Unix time in ns) or, where that has passed, at once; the time it is then."""
    now = now_ns()
    if due - now > SLACK_NS:
        time.sleep((due - now - SLACK_NS) / 1e9)
        now = now_ns()
    while now < due:
        now = now_ns()
    return now


class Gate:
    """Holds senders without a schedule back, while a receiver here is too far behind."""

    def __init__(self, run: Run) -> None:
        self.run, self.lock = run, threading.Lock()
        self.room = BEHIND  # messages that may be sent before receivers are looked at
        self.held = False  # it had to

    def admit(self) -> None:
        """Waits until one more message may be sent."""
        run = self.run
        with self.lock:
            while self.room < 1 and not run.stopping and now_ns() < run.end:
                own = itertools.chain((len(sender.numbers) for sender in run.senders), repeat(0))
                got = (client.delivered() + n for client, n in zip(run.clients, own) if not client.failure)
                self.room = BEHIND - run.sent() + min(got, default=0)
                if self.room <= BEHIND // 4:  # not for each message anew
                    self.room, self.held = 0, True
                    time.sleep(PROGRESS_S / 10)
            self.room -= 1


class Sender:
    """Sends its share of the schedule, in a thread of its own, and notes when, and after what it had received."""

    def __init__(self, run: Run, client: Client) -> None:
        self.run, self.client = run, client
        self.numbers = array("i")
        self.times = array("q")  # ns, at the call
        self.after = array("i")  # place in client.order of the last line received before, or -1
        self.sending = False  # the last one may not have been sent whole

    def live(self) -> None:
        """The thread: ends with the schedule, with the run, or with its connection."""
        run, load = self.run, self.run.load
        first, step = self.client.number, load.senders
        while not (self.client.joined_s or run.stopping):
            time.sleep(PROGRESS_S / 10)
        first += -(-max(0, run.since(self.client) - first) // step) * step
        numbers = range(first, run.total, step) if load.rate else itertools.count(first, step)
        with contextlib.suppress(OSError):
            for number in numbers:
                if not load.rate:
                    run.gate.admit()
                now = wait_until(run.due(number)) if load.rate else now_ns()
                # What is due is sent, even if late: but not for ever, at a rate that cannot be.
                over = now > run.end + (int(OVERTIME_S * 1e9) if load.rate else 0)
                if run.stopping or over or number >= run.total > 0:
                    return
                self.sending = True
                self.numbers.append(number)
                self.times.append(now)
                self.after.append(len(self.client.order) - 1)
                self.client.send(run.wire.line(number))
                self.sending = False


def resolve(host: str, port: int) -> tuple[int, Any]:
    """Family and address of a server: the first of all that its name has that takes connections; raises FatalError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "not the name of a host"
        raise FatalError(f"{escape_controls(host)[:WIDTH]}: {reason}") from None
    for family, _, _, _, address in found if len(found) > 1 else ():
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(START_S)
            probe.connect(address)
            return family, address
    return found[0][0], found[0][4]


class Run:
    """One load against one server: `execute` does it; what happened is in the attributes afterwards."""

    prefix = "c"
    lead_ns = 100_000_000  # from when senders are started to the first message
    insists = False  # its clients try again to join

    def __init__(self, load: Load, target: Target, progress: Callable[[Run], None]) -> None:
        self.load, self.target, self.progress = load, target, progress
        self.wire = Wire(load.protocol, load.channel, load.size, load.seed, load.senders, os.urandom(16))
        self.lines = Lines(self.wire)
        self.channel, self.password = load.channel, load.password
        self.addresses = [resolve(*server) for server in target.servers()]
        arrivals, span_ns = load.clients * (load.rate or FLOOD_RATE), int(load.duration_s * 1e9)
        self.turns = Turns(load.clients, arrivals, span_ns, int.from_bytes(os.urandom(8), "big"))
        # Not so rarely that more piles up than one read takes.
        piling = RECV_BYTES / (load.rate * (load.size + SENT_WITH_BYTES)) if load.rate else READ_EVERY_S
        self.read_every = max(READ_EVERY_S, min(load.clients / READS, piling))
        self.total = int(load.rate * (load.warmup_s + load.duration_s))
        self.begin = self.end = 0  # ns: the schedule starts, nothing is due any more
        self.disturbed_at = 0  # ns: disturbers began, or 0
        self.last_arrival = 0  # ns, once all is sent
        self.settling = self.stopping = False
        self.gate = Gate(self)
        self.interrupted = self.faulty = False
        self.visits: dict[int, float] = {}  # when a newcomer came (ns) -> seconds until it had joined; 0: not yet
        self.clients = [self.client(number) for number in range(load.clients)]
        self.senders = [Sender(self, client) for client in self.clients[: load.senders]]
        self.joined, self.all_settled = threading.Semaphore(0), threading.Semaphore(0)
        self.threads: list[threading.Thread] = []
        self.throttled = False  # the server still trickled out messages when we stopped waiting
        self.before: dict[str, float] | None = None  # of the server: Target.usage
        self.afterwards: dict[str, float] | None = None
        self.cpu_s = self.elapsed_s = self.joining_s = 0.0

    def client(self, number: int) -> Client:
        """One that has not connected yet."""
        return (TlsClient if self.load.tls else Client)(self, number)

    def due(self, number: int) -> int:
        """When message `number` is to be sent, in ns."""
        return self.begin + int(number * 1e9 / self.load.rate)

    def since(self, client: Client) -> int:
        """The first message that was due when a client had joined."""
        if not client.joined_s:
            return self.total
        return max(0, math.ceil((client.joined_ns - self.begin) * self.load.rate / 1e9))

    def due_between(self, start: int, end: int) -> set[int]:
        """Messages of a turn that is over. Without a schedule, the newest of each sender: what it sent before is there
        when they are.
        """
        if not self.load.rate:
            return {sender.numbers[-1] for sender in self.senders if sender.numbers}
        first, last = (math.ceil((moment - self.begin) * self.load.rate / 1e9) for moment in (start, end))
        return set(range(max(first, 0), min(last, self.total)))

    @cached_property
    def odd_lines(self) -> set[int]:
        """Numbers of lines that nobody can explain."""
        gone = "|".join(GONE.format(client.name) for client in self.clients if client.failure)
        kinds = [self.wire.kinds, *[re.compile(gone.encode())] * bool(gone), *[DISTURBER] * self.faulty]
        others = self.lines.others.items()
        return {n for n, line in others if MARKED.search(line) or not any(kind.fullmatch(line) for kind in kinds)}

    def delivered(self) -> int:
        """Deliveries so far."""
        return sum(client.delivered() for client in self.clients)

    def sent(self) -> int:
        """Messages sent so far."""
        return sum(len(sender.numbers) for sender in self.senders)

    def execute(self) -> None:
        """Joins, sends, waits for what is under way, stops. Raises FatalError where not all could join."""
        stack = threading.stack_size(STACK_BYTES)
        sys.setswitchinterval(max(0.005, len(self.clients) * SWITCH_CLIENT_S))
        try:
            self._work()
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            threading.stack_size(stack)
            self.stopping = True
            for client in self.clients:
                client.stop()
            for thread in self.threads:  # what they still store must not change under the analysis
                thread.join(STOP_S)

    def _work(self) -> None:
        self._join()
        self._finish(self._start())

    def _join(self) -> None:
        began = time.monotonic()
        for number, client in enumerate(self.clients):
            wait = began + number / self.load.connect_rate - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            self.threads.append(threading.Thread(target=client.live, daemon=True))
            try:
                self.threads[-1].start()
            except RuntimeError as error:
                self.threads.pop()
                raise FatalError(f"{number} clients are all that this system lets start: {error}") from None
        for _ in self.clients:
            if not self.joined.acquire(timeout=JOIN_S):
                raise FatalError(f"not everybody had joined within {JOIN_S:.0f} s")
        self.joining_s = time.monotonic() - began
        failed = [client for client in self.clients if not client.joined_s]
        if failed:
            reason = with_hint(failed[0].failure, {**HINTS, **JOIN_HINTS})
            raise FatalError(f"{len(failed)} of {len(self.clients)} could not join: {reason}")
        if len(self.addresses) > 1:
            self._meet()
        self._settle()

    def _settle(self) -> None:
        """Waits until each client has an answer, and with it all notices of joins, which are not part of the run."""
        self.settling = True
        question = {"irc": "PING settled\r\n", "plain": "/topic\n", "json": '{"type": "command", "text": "/topic"}\n'}
        for client in self.clients:
            with contextlib.suppress(OSError):
                client.send(self.wire.wrap(question[self.wire.dialect].encode()))
        for _ in self.clients:
            if not self.all_settled.acquire(timeout=JOIN_S):
                raise FatalError(f"not everybody had an answer within {JOIN_S:.0f} s")
        lost = [client for client in self.clients if client.settled < 0]
        if lost:
            raise FatalError(
                f"{len(lost)} of {len(self.clients)} were disconnected at once: {with_hint(lost[0].failure)}"
            )

    def _meet(self) -> None:
        """Waits until each of the linked servers knows of everybody: to whom it does not know, it passes nothing on."""
        everybody = {client.name.encode() for client in self.clients}
        end = time.monotonic() + JOIN_S
        for client in self.clients[: len(self.addresses)]:
            while not client.present >= everybody:
                if time.monotonic() > end:
                    host, port = client.address[:2]
                    missing = f"{len(everybody - client.present)} of {len(everybody)} clients"
                    raise FatalError(f"{host}:{port} has not heard of {missing} within {JOIN_S:.0f} s: is it linked?")
                client.send(f"NAMES {self.channel}\r\n".encode())
                time.sleep(PROGRESS_S)

    def _start(self) -> list[threading.Thread]:
        """Starts the schedule, and the senders."""
        load = self.load
        self.before, self.cpu_s = self.target.usage(), -time.process_time()
        self.begin = now_ns() + self.lead_ns
        self.end = self.begin + int((load.warmup_s + load.duration_s) * 1e9)
        self.turns.begin = self.begin + int(load.warmup_s * 1e9)
        for client in self.clients if self.turns.groups > 1 else ():
            turns = self.turns.of(client.number)
            lead_ns = LEAD_NS + 3 * LEAD_NS * client.number // len(self.clients)
            client.watch = Watch(turns, self.due_between, client.order, self.read_every, lead_ns)
        threads = [threading.Thread(target=sender.live, daemon=True) for sender in self.senders]
        for thread in threads:
            thread.start()
        return threads

    def _finish(self, threads: list[threading.Thread]) -> None:
        """Waits for the senders, and for what is under way."""
        try:
            while any(thread.is_alive() for thread in threads) and now_ns() < self.end + int(
                (OVERTIME_S + PAUSE_S) * 1e9
            ):
                self._turn()
            self._drain()
        finally:
            self.elapsed_s = ((self.last_arrival or now_ns()) - self.begin) / 1e9
            self.afterwards = self.target.usage()
            self.cpu_s += time.process_time()

    def _drain(self) -> None:
        """Waits for what is under way."""
        seen, quiet_since, end = -1, 0.0, time.monotonic() + DRAIN_S
        while True:
            if self.delivered() > seen:
                seen, quiet_since, self.last_arrival = self.delivered(), time.monotonic(), now_ns()
            if time.monotonic() > quiet_since + (QUIET_S if seen < self.expected() else PAUSE_S):
                return
            self._turn()
            if time.monotonic() > end:
                self.throttled = True
                return

    def expected(self) -> int:
        """Deliveries that there should be by now, if senders do not get their own."""
        return self.sent() * (len(self.clients) - 1)

    def _turn(self) -> None:
        time.sleep(PROGRESS_S)
        self.progress(self)


class Return(Run):
    """What comes after all connections were cut at once: all come back, and send as soon as they are in."""

    lead_ns, insists = 0, True

    def __init__(self, load: Load, target: Target, progress: Callable[[Run], None]) -> None:
        longest = load._replace(warmup_s=0.0, duration_s=2 * JOIN_S + load.duration_s, connect_rate=math.inf)
        super().__init__(longest, target, progress)
        self.failure = ""  # why not all came
        self._go_on_s = load.duration_s

    def expected(self) -> int:
        """Deliveries that there should be by now: to each client what the others have sent since it was in."""
        since = [(client, self.since(client)) for client in self.clients]
        pairs = [(sender, first) for sender in self.senders for client, first in since if client != sender.client]
        return sum(len(sender.numbers) - bisect_left(sender.numbers, first) for sender, first in pairs)

    def _work(self) -> None:
        threads = self._start()
        try:
            self._join()
        except FatalError as error:
            self.failure = str(error)
        self.end = now_ns() + int(self._go_on_s * 1e9)
        self.total = int((self.end - self.begin) * self.load.rate / 1e9)
        self._finish(threads)


# -----------------------------------------------------------------------------
# reflector
# -----------------------------------------------------------------------------


def reflect(port: int) -> None:
    """The least that a broadcast server can do, for `--calibrate`: passes on what comes, and checks nothing."""
    selector, listener = selectors.DefaultSelector(), socket.create_server(("127.0.0.1", port), backlog=1024)
    selector.register(listener, selectors.EVENT_READ)
    members: dict[socket.socket, bytes] = {}  # -> its nick
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                sock = listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(sock, selectors.EVENT_READ)
            else:
                reflect_from(cast(socket.socket, key.fileobj), selector, members)


def reflect_from(sock: socket.socket, selector: selectors.BaseSelector, members: dict[socket.socket, bytes]) -> None:
    """Answers or passes on what one socket sent; lines come whole, because our clients send them so."""
    try:
        data = sock.recv(65536)
    except OSError:
        data = b""
    if not data:
        selector.unregister(sock)
        members.pop(sock, None)
        sock.close()
        return
    said = []
    for line in data.splitlines():
        if line.startswith(b"PRIVMSG"):
            said.append(b":%s!u@h %s\r\n" % (members[sock], line))
        elif line.startswith(b"NICK"):
            members[sock] = line[5:]
        else:
            answers = {b"USER": b":s 001 x :hi\r\n", b"JOIN": b":s 366 x #x :end\r\n", b"PING": b":s PONG s :x\r\n"}
            sock.sendall(answers.get(line[:4], b""))
    for member in list(members) if said else []:
        if member is not sock:
            with contextlib.suppress(OSError):
                member.sendall(b"".join(said))


# -----------------------------------------------------------------------------
# disturbers
# -----------------------------------------------------------------------------


class Over(Exception):
    """The run has ended."""


class Peer:
    """A disturber, in a thread of its own: one connection after another does the same, until the run is over.

    What it does may return, to do it again at once. It lets OSError pass, which tells that it was closed.
    """

    def __init__(self, load: Load, address: tuple[int, Any], over: threading.Event, number: int) -> None:
        self.load, self.over, self.number = load, over, number
        self.random = random.Random(f"{load.seed} {number}")
        self.lives = self.written = self.answers = self.stayed = 0
        self.closed: list[tuple[str, float | None]] = []  # why, and after how many seconds, where that is known
        self.sock: socket.socket
        self._address = address
        self._heard = b""

    def live(self, act: Callable[[Peer], None]) -> None:
        """The thread."""
        while not self.over.is_set():
            began, self._heard, self.lives = time.monotonic(), b"", self.lives + 1
            with socket.socket(self._address[0], socket.SOCK_STREAM) as self.sock:
                try:
                    self._connect()
                    act(self)
                except Over:
                    if time.monotonic() > began + DISTURBER_PAUSE_S:  # it did not just come
                        self._look_back()
                except OSError as error:
                    self.closed.append((self._last_words(error), time.monotonic() - began))
                    self.over.wait(DISTURBER_PAUSE_S)

    def _connect(self) -> None:
        """Connects from where limits hold that do not for the load: chat.py is told to exempt 127.0.0.1 from them."""
        self.sock.settimeout(TLS_WAIT_S)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        address = self._address[1]
        if sys.platform == "linux" and address[0].startswith("127."):
            self.sock.bind((f"127.0.0.{2 + self.number // PER_ADDRESS}", 0))
        self.sock.connect(address)

    def _look_back(self) -> None:
        """Finds out at the end whether it had been dropped without noticing."""
        end = time.monotonic() + LAST_WORDS_S
        try:
            while self.hear() and time.monotonic() < end:
                pass
            self.stayed += 1
        except OSError as error:
            self.closed.append((self._last_words(error), None))

    def _last_words(self, error: OSError) -> str:
        ends = rb"(?:ERROR :?|\*\*\* |HTTP/1\.1 (?=[45])|\x88[\0-\x7d][\x03\x0f][\0-\xff])([^\r\n]*)"
        said = re.findall(ends, self._heard)
        text = str(said[-1], "utf-8", "replace") if said else error.strerror or str(error)
        return re.sub(r"\bd\d+x\d+\b", "...", text)

    def rest(self, seconds: float | None = None) -> None:
        """Does nothing."""
        if self.over.wait(seconds):
            raise Over

    def send(self, data: bytes) -> None:
        """Writes all of it, however long that takes."""
        view = memoryview(data)
        while view:
            self.rest(0)
            with contextlib.suppress(socket.timeout):
                sent = self.sock.send(view)
                self.written += sent
                view = view[sent:]

    def say(self, *lines: str) -> None:
        """Sends lines."""
        self.send("".join(f"{line}\r\n" for line in lines).encode())

    def hear(self, seconds: float = 0.0, most: int = RECV_BYTES) -> bytes:
        """What comes within so many seconds; b'' for nothing."""
        self.sock.settimeout(seconds)
        try:
            data = self.sock.recv(most)
        except (BlockingIOError, socket.timeout):
            return b""
        finally:
            self.sock.settimeout(TLS_WAIT_S)
        if not data:
            raise OSError("without a word")
        self.answers += len(re.findall(rb"(?:^|\n):[^ \n]+ (?:\d{3}|PONG|FAIL) ", data))
        self._heard = self._heard[-LAST_WORDS_BYTES:] + data
        return data

    def listen(self, wanted: str = "(?!)") -> None:
        """Reads until something comes that matches; normally nothing does."""
        while not re.search(wanted.encode(), self._heard):
            self.rest(0)
            self.hear(TLS_WAIT_S)

    def enter(self, channel: str = "", password: str = "") -> None:
        """Registers, and joins a channel."""
        password, name = password or self.load.password, f"d{self.number}x{self.lives}"
        self.say(*[f"PASS {password}"] * bool(password), f"NICK {name}", f"USER {name} 0 * :{name}")
        self.listen(" 001 ")
        self.say(*[f"JOIN {channel}"] * bool(channel))

    def join(self) -> None:
        """Registers, and joins the channel."""
        self.enter(self.load.channel)

    def introduction(self) -> str:
        """What joins the channel in the dialect of JSON."""
        item = {"type": "join", "user": f"d{self.number}x{self.lives}", "channel": self.load.channel}
        return json.dumps({**item, "password": self.load.password})

    def begin_upgrade(self) -> None:
        """Asks for WebSocket, but for the last line."""
        self.send(upgrade_request(self._address[1], "A" * 22 + "==").encode()[:-2])

    def enter_framed(self) -> None:
        """Joins the channel by WebSocket."""
        self.begin_upgrade()
        self.say("")
        self.listen(" 101 ")
        self.send(masked_frame(TEXT_OPCODE, self.introduction().encode()))
        self.listen('"join"')

    def reset(self) -> None:
        """Makes the connection end with a reset, when it is closed next."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def pouring(*lines: str, member: bool = False, reads: bool = True) -> Callable[[Peer], None]:
    """What says lines again and again, as fast as the server takes them."""

    def pour(peer: Peer) -> None:
        peer.enter(peer.load.channel if member else "")
        form = partial("\r\n".join(lines).format, channel=peer.load.channel, number=peer.number)
        for turn in itertools.count(0, TURNS):
            peer.say(*(form(turn=number) for number in range(turn, turn + TURNS)))
            if reads:
                peer.hear()

    return pour


def stall(peer: Peer) -> None:
    peer.join()
    peer.rest()


def going_on(
    begin: Callable[[Peer], None], then: bytes = b"", more: bytes = b"", pause: float = 0.0
) -> Callable[[Peer], None]:
    """What begins something, sends what is next, and then stops; or sends more without end, with pauses by the byte."""

    def go_on(peer: Peer) -> None:
        begin(peer)
        peer.send(then)
        for part in itertools.cycle([bytes([byte]) for byte in more] if pause else [more] * bool(more)):
            peer.send(part)
            peer.hear(0.0, 1 if pause else RECV_BYTES)
            peer.rest(pause)
        peer.listen()

    return go_on


def send_garbage(peer: Peer) -> None:
    """Noise, alone and in what the dialects of a chat begin with; short noise might be a name."""
    noise = bytes(peer.random.choices(range(256), k=peer.random.randrange(20, 600)))
    kinds = (b"%", b"NICK %", b"CAP REQ :%", b"@% PRIVMSG %", b"PRIVMSG % %", b'{"type": "%"}', b'{"%":' + b"[" * 4000)
    first = peer.random.choice(kinds)
    for kind in (first, *peer.random.choices(kinds, k=20)):
        peer.send(kind.replace(b"%", noise) + b"\n")
    peer.hear(DISTURBER_LIFE_S)
    peer.rest(DISTURBER_LIFE_S)


def reset_in_line(peer: Peer) -> None:
    peer.join()
    peer.send(f"PING x\r\nPRIVMSG {peer.load.channel} :half of a li".encode())
    peer.listen(" PONG ")  # it has been read: a reset would have thrown it away
    peer.reset()


def vanish(peer: Peer) -> None:
    peer.join()
    peer.rest(DISTURBER_LIFE_S)
    peer.reset()


def guess(peer: Peer) -> None:
    peer.enter(password=f"guess{peer.lives}")
    raise OSError("let in without the password")


def ban(peer: Peer) -> None:
    """Half of them keep channels with many bans, into which the others go with names that fold to long ones."""
    peer.enter()
    here = "#d0,#d1,#d2,#d3"
    for turn in itertools.count(0, MODES):
        if peer.number < 4:
            masks = " ".join(f"*{'?' * 60}{number:02}!*@*" for number in range(turn % 100, turn % 100 + MODES))
            peer.say(f"JOIN #d{peer.number}", f"MODE #d{peer.number} +{'b' * MODES} {masks}")
        else:
            peer.say(f"NICK {chr(0xFDFA) * 20}{turn % 1000}", f"JOIN {here}", f"PART {here}")
        peer.hear()


def move(peer: Peer) -> None:
    """In the dialect of JSON, with many channels a line, some of them in two spellings."""
    here = peer.load.channel
    names = ",".join(f"{here},#z{number},{here.upper()}" for number in range(8))
    line = json.dumps({"type": "join", "channel": names})
    peer.say(peer.introduction())
    while True:
        peer.say(*[line] * TURNS)
        peer.hear()


TALK = "x" * 64
HALF = masked_frame(TEXT_OPCODE, b" " * 4000)[:2000]
EMPTY = b"\x01\x80mask", b"\0\x80mask" * 200  # the beginning of a text, and more of it, without a byte
PINGED = masked_frame(0x89, TALK.encode()) * 200
FORMERLY = "timestamp=2020-01-01T00:00:00.000Z timestamp=2100-01-01T00:00:00.000Z"
QUESTIONS = ("CHATHISTORY LATEST {channel} * 100", "WHO {channel}", "LIST", "NAMES {channel}", "WHOIS c0", "LUSERS")


class Fault(NamedTuple):
    """What somebody does to a server that it should not mind."""

    what: str  # they do
    peers: int
    act: Callable[[Peer], None]


FAULTS = {
    "stalled": Fault("join the channel and never read", 5, stall),
    "trickle": Fault(
        "join the channel, read and send a byte a second", 20, going_on(Peer.join, more=b"PING x\r\n", pause=1.0)
    ),
    "silent": Fault("connect and say nothing", 500, Peer.listen),
    "half-tls": Fault("begin a TLS handshake and stop", 100, going_on(lambda peer: peer.send(b"\x16\x03\x01"))),
    "flood": Fault("talk without end", 1, pouring(f"PRIVMSG c0 :{TALK}", "PING x")),
    "notices": Fault("talk without end to the channel", 8, pouring(f"NOTICE {{channel}} :{TALK}", member=True)),
    "endless": Fault("send lines of a megabyte", 4, going_on(Peer.enter, more=b"x" * 1_000_000 + b"\r\n")),
    "blank": Fault("send blank lines", 4, pouring("\r\n" * 1000)),
    "garbage": Fault("send noise, alone and in all dialects", 8, send_garbage),
    "resets": Fault("join the channel and reset in mid-line", 8, reset_in_line),
    "vanish": Fault("join the channel, do not read, and are gone after a second", 50, vanish),
    "storm": Fault("connect and reset", 4, Peer.reset),
    "joins": Fault("leave and join the channel", 4, pouring("PART {channel}", "JOIN {channel}", member=True)),
    "rooms": Fault("join new channels", 4, pouring("JOIN #d{number}-{turn}")),
    "nicks": Fault("change their names, seen by the channel", 4, pouring("NICK d{number}n{turn}", member=True)),
    "claims": Fault("ask for names that are taken", 4, pouring("NICK c0", "NICK c1", "NICK c2")),
    "questions": Fault("ask for history and lists", 8, pouring(*QUESTIONS, member=True)),
    "unread": Fault("ask the same and do not read", 8, pouring(*QUESTIONS, member=True, reads=False)),
    "guesses": Fault("guess the password", 50, guess),
    "masks": Fault("set long bans, and join there with long names", 8, ban),
    "targets": Fault(
        "ask in which of many channels something was said",
        16,
        pouring("JOIN #d{number}-{turn}", "PRIVMSG #d{number}-{turn} :x", f"CHATHISTORY TARGETS {FORMERLY} 100"),
    ),
    "who": Fault("ask who is in the channel", 16, pouring("WHO {channel}", member=True)),
    "moves": Fault("move to and fro between channels, many a line", 8, move),
    "slow-headers": Fault(
        "send a byte a second of a request to the web server",
        50,
        going_on(Peer.begin_upgrade, more=b"X: x\r\n", pause=1.0),
    ),
    "endless-headers": Fault(
        "send requests to the web server that never end", 8, going_on(Peer.begin_upgrade, more=b"X: x\r\n" * 1000)
    ),
    "half-upgrade": Fault("begin a WebSocket handshake and stop", 100, going_on(Peer.begin_upgrade)),
    "half-frame": Fault("join by WebSocket and stop within a frame", 50, going_on(Peer.enter_framed, HALF)),
    "fragments": Fault(
        "join by WebSocket and send a text in pieces, without end", 8, going_on(Peer.enter_framed, *EMPTY)
    ),
    "pings": Fault("join by WebSocket and ping without end", 8, going_on(Peer.enter_framed, more=PINGED)),
}


def disturb(fault: Fault, load: Load, address: tuple[int, Any]) -> int:
    """The process of the disturbers: says that it is ready, does it from a line on standard input to its end, and says,
    as JSON, what became of them.
    """
    if hasattr(os, "nice"):
        os.nice(19)  # their processors would be elsewhere
    threading.stack_size(STACK_BYTES)
    over = threading.Event()
    peers = [Peer(load, address, over, number) for number in range(fault.peers)]
    print("ready", flush=True)
    if not sys.stdin.readline():
        return 0
    began, cpu = time.monotonic(), time.process_time()
    threads = [threading.Thread(target=peer.live, args=(fault.act,), daemon=True) for peer in peers]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    over.set()
    for thread in threads:
        thread.join(STOP_S)
    print(json.dumps({"seconds": seconds, "cpu_share": cpu / seconds, **fates(peers)}))
    return 0


def fates(peers: Sequence[Peer]) -> dict[str, Any]:
    """What became of disturbers; those that were closed by the reason, with the median of the seconds it took."""
    closed: dict[str, list[float | None]] = defaultdict(list)
    for words, after in itertools.chain.from_iterable(peer.closed for peer in peers):
        closed[words].append(after)
    known = {words: [after for after in times if after is not None] for words, times in closed.items()}
    return {
        "connections": sum(peer.lives for peer in peers),
        "stayed": sum(peer.stayed for peer in peers),
        "written": sum(peer.written for peer in peers),
        "answers": sum(peer.answers for peer in peers),
        "closed": [
            [words, len(times), statistics.median(known[words]) if known[words] else None]
            for words, times in sorted(closed.items(), key=lambda item: len(item[1]), reverse=True)
        ],
    }


def come_and_go(run: Run) -> None:
    """The thread of a witness who connects anew, joins and leaves all the time: what newcomers wait."""
    for number in itertools.count():
        client, began = run.client(number), now_ns()
        client.name = f"n{number}"
        if run.stopping or began > run.end:
            return
        run.visits[began] = 0.0
        run.visits[began] = client.visit()
        time.sleep(NEWCOMER_INTERVAL_S)


class Disturbance:
    """That process, which does its worst in the second half of what is measured, and a witness who comes anew."""

    def __init__(self, name: str, load: Load, target: Target, args: argparse.Namespace) -> None:
        command = [sys.executable, os.path.abspath(__file__), "--disturb", name, "--host", target.host]
        command += ["--port", str(target.port), "--channel", load.channel, "--seed", str(load.seed)]
        command += ["--password-file", args.password_file] if args.password_file else []
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        self._witness: threading.Thread | None = None
        cast(Any, self._process.stdout).readline()  # it is ready: starting must not disturb yet

    def watch(self, run: Run) -> None:
        """Lets them begin when it is time."""
        if not self._witness:
            self._witness = threading.Thread(target=come_and_go, args=(run,), daemon=True)
            self._witness.start()
        if not run.disturbed_at and now_ns() > (run.begin + run.end + int(run.load.warmup_s * 1e9)) // 2:
            run.disturbed_at = now_ns()
            with contextlib.suppress(OSError):
                cast(Any, self._process.stdin).write(b"\n")
                cast(Any, self._process.stdin).flush()

    def end(self) -> dict[str, Any] | None:
        """Ends it; what became of them."""
        try:
            out = self._process.communicate(timeout=2 * STOP_S)[0]
        except subprocess.TimeoutExpired:
            self._process.kill()
            out = self._process.communicate()[0]
        return dict(json.loads(out)) if out else None


# -----------------------------------------------------------------------------
# analysis
# -----------------------------------------------------------------------------


def collect(run: Run) -> tuple[Sent, array[int]]:
    """What was sent, and when (ns), by message number."""
    total = 1 + max((max(sender.numbers) for sender in run.senders if sender.numbers), default=-1)
    senders, after, times = array("i", [-1]) * total, array("i", [-1]) * total, array("q", [0]) * total
    for sender in run.senders:
        order = sender.client.order
        for number, moment, place in zip(sender.numbers, sender.times, sender.after):
            senders[number] = sender.client.number
            times[number] = moment
            after[number] = next((order[n] for n in range(place, -1, -1) if order[n] < OTHERS), -1)
        if sender.sending and not any(number in client.order for client in run.clients):
            senders[number], times[number] = -1, 0
    return Sent(senders, after), times


class Latencies:
    """Latencies in ms of the deliveries that were timed, each from its own chunk's time of arrival."""

    def __init__(self, run: Run, sample: Sample) -> None:
        self.corrected, self.uncorrected = array("d"), array("d")
        self.halves = array("d"), array("d")  # before and since disturbers began
        visits = [(came, 1e3 * took or (now_ns() - came) / 1e6) for came, took in list(run.visits.items())]
        self.newcomers = array("d", (took for came, took in visits if came + took * 1e6 >= run.disturbed_at > 0))
        self.seconds: dict[int, array[float]] = defaultdict(lambda: array("d"))
        self.last: dict[int, float] = {}  # message -> until its last receiver had it, if all were watched
        own: dict[int, array[float]] = defaultdict(lambda: array("d"))
        never = [(client, number, math.inf) for client, number in sample.missing]
        for client, number, late in itertools.chain(sample.late, never):
            due = sample.due[number]
            latency = late / 1e6
            own[client].append(latency)
            self.corrected.append(latency)
            self.uncorrected.append(latency - (sample.times[number] - due) / 1e6)
            self.halves[due >= run.disturbed_at].append(latency)
            self.seconds[(due - run.begin) // 1_000_000_000].append(latency)
            if sample.turns.groups == 1:
                self.last[number] = max(self.last.get(number, 0.0), latency)
        self.medians = [(statistics.median(values), run.clients[client].name) for client, values in own.items()]

    def as_dict(self) -> dict[str, Any]:
        """All that the result tells of latency."""
        ordered = sorted(self.corrected)
        came = ordered[: bisect_left(ordered, math.inf)]
        halves = zip(("undisturbed", "disturbed"), map(summarize, self.halves))
        return {
            "latency": {
                "corrected": summarize(ordered),
                "uncorrected": summarize(self.uncorrected),
                "complete": summarize(array("d", self.last.values())),
                **(dict(halves) if self.halves[0] else {}),
                **({"newcomers": summarize(self.newcomers)} if self.newcomers else {}),
            },
            "histogram": histogram(came),
            "curve": [point for point in curve(ordered) if point[1] < math.inf],
            "over_time": self.over_time(),
            "fairness": self.fairness(),
        }

    def over_time(self) -> list[list[float | None]]:
        """[second, p50, p99, max] for each second."""
        rows: list[list[float | None]] = []
        for second, values in sorted(self.seconds.items()):
            summary = summarize(values)
            rows.append([second, summary["p50"], summary["p99"], summary["max"]])
        return rows

    def fairness(self) -> dict[str, Any] | None:
        """How the medians of the receivers differ."""
        if len(self.medians) < 2 or max(self.medians)[0] == math.inf:
            return None
        (best, _), (worst, slowest) = min(self.medians), max(self.medians)
        return {"best": best, "worst": worst, "ratio": worst / best if best > 0 else None, "slowest": slowest}


def judged(run: Run, args: argparse.Namespace) -> tuple[Sample, list[History], bool, list[Finding]]:
    """What was timed in a run, what each client saw, whether senders got their own, and what the checker finds."""
    sent, times = collect(run)
    due = [run.due(number) if run.load.rate else moment for number, moment in enumerate(times)]
    sample = Sample(run.turns, sent, due, times)
    early = [sample.add(client.number, client.order, client.chunks, run.since(client)) for client in run.clients]
    echo = any(not set(sender.numbers).isdisjoint(sender.client.order) for sender in run.senders)
    histories = [history(run, client, early[client.number], len(times)) for client in run.clients]
    return sample, histories, echo, judge_run(run, args, sent, histories, echo)


def analyse(
    run: Run, args: argparse.Namespace, floor: dict[str, float] | None = None, again: Return | None = None
) -> dict[str, Any]:
    """The result of a run, and of the return after it, in the form that JSON_HELP describes."""
    sample, histories, echo, findings = judged(run, args)
    sent = sample.sent
    latencies, sends = Latencies(run, sample), sum(sender >= 0 for sender in sent.senders)
    delivered, seconds = deliveries(sent, histories), max(run.elapsed_s, 1e-9)
    result: dict[str, Any] = {
        **conditions(run, args),
        "join": joining(run),
        "scheduled": run.total if run.load.rate and not run.interrupted else sends,
        "sent": sends,
        "expected": sends * (len(run.clients) - (not echo)),
        "deliveries": delivered,
        "timed": {"due": len(latencies.corrected), "rough": sample.rough, "missing": len(sample.missing)},
        "elapsed_s": run.elapsed_s,
        "deliveries_per_s": delivered / seconds,
        "messages_per_s": sends / seconds,
        **latencies.as_dict(),
        "clock": clock(run),
        "generator": generator(run, sample, floor, summarize(latencies.corrected)),
        "server": cost(run, delivered),
        "checks": [finding._asdict() for finding in findings],
        "disconnected": sum(bool(client.failure) for client in run.clients),
        "failures": failures(run),
        "interrupted": run.interrupted,
        "throttled": throttled(run, sends),
    }
    if again:
        add_return(result, again, args)
    result["thresholds"] = [
        {"text": text, "value": measured(limit[0], result), "exceeded": exceeded(limit, result)}
        for text, limit in zip(args.fail_if, map(parse_threshold, args.fail_if))
    ]
    return {**result, "verdict": verdict(result)}


def add_return(result: dict[str, Any], run: Return, args: argparse.Namespace) -> None:
    """Adds to a result how all came back, judged for those who were in."""
    sample, _, _, findings = judged(run, args)
    back = [(client.joined_ns - run.begin) / 1e6 for client in run.clients if client.joined_s]
    everybody = len(back) == len(run.clients)
    took, steady = summarize(back), steady_ms(run, sample, result["latency"]["corrected"].get("p99"))
    result["reconnect"] = {
        "all_in_s": max(back) / 1e3 if everybody else None,
        "p50": took.get("p50"),
        "p99": took.get("p99"),
        "steady_s": max(*back, steady) / 1e3 if everybody and steady is not None else None,
        "unsteady_s": run.elapsed_s if everybody and steady is None else None,
        "expected": run.expected(),
        "deliveries": run.expected() - findings[0].count if findings[0].verdict in ("pass", "FAIL") else None,
    }
    for check, finding in zip(result["checks"], findings):
        check["verdict"] = min(check["verdict"], finding.verdict, key=("FAIL", "unknown", "pass", "skipped").index)
        check["count"] += finding.count
        check["witness"] = check["witness"] or finding.witness and f"after the return, {finding.witness}"
    result["disconnected"] += sum(bool(client.failure or not client.joined_s) for client in run.clients)
    result["failures"] += [run.failure] * bool(run.failure) + failures(run)
    result["interrupted"] = result["interrupted"] or run.interrupted


def steady_ms(run: Run, sample: Sample, usual: float | None) -> float | None:
    """When deliveries became as quick as usual, in ms since `run` began; None where they did not."""
    slots: dict[int, list[float]] = defaultdict(list)
    never = [(client, number, math.inf) for client, number in sample.missing]
    for _, number, late in itertools.chain(sample.late, never):
        slots[(sample.due[number] - run.begin) // STEADY_NS].append(late / 1e6)
    slow = [slot for slot, values in slots.items() if statistics.median(values) > (usual or 0.0)]
    last = max(slow, default=-1)
    return (last + 1) * STEADY_NS / 1e6 if slots and last < max(slots) else None


def judge_run(
    run: Run, args: argparse.Namespace, sent: Sent, histories: Sequence[History], echo: bool
) -> list[Finding]:
    """What the checker finds; what was under way is not lost."""
    findings = check(sent, histories, echo, set(args.check) - ({"loss"} if run.interrupted else set()))
    if run.throttled and findings[0].verdict == "FAIL":
        findings[0] = findings[0]._replace(verdict="unknown")
    return findings


def history(run: Run, client: Client, early: Sequence[tuple[int, int]], total: int) -> History:
    """What a client saw. All were joined until after the last message, and, but for a return, before the first; one
    that was dropped because it read too slowly may miss anything.
    """
    sender = client.number if client.number < len(run.senders) else -1
    here = client.others[bisect_left(client.others, client.settled) if client.settled >= 0 else len(client.others) :]
    for last in reversed(here[-1 - run.wire.framed :]) if client.failure else ():  # of frames two: a text and a close
        if last < len(client.order) - LAST_WORDS_LINES or MARKED.search(run.lines.others[client.order[last]]):
            break
        here.pop()  # said with its last words
    odd = run.odd_lines
    strange = []
    if not odd.isdisjoint(map(client.order.__getitem__, here)):
        strange = [run.lines.others[client.order[place]] for place in here if client.order[place] in odd]
    order = array("I", filter(OTHERS.__gt__, client.order)) if client.others else client.order
    first, last = run.since(client), 0 if dropped_slow(client) else total
    return History(client.name, sender, order, strange, first, last, early)


def verdict(result: Result) -> str:
    """PASS, or the worst that can be said of a run. What is not known, or was not tried, is no PASS."""
    if _checks(result, "FAIL"):
        return "FAIL"
    if result["interrupted"]:
        return "INTERRUPTED"
    if any(threshold["exceeded"] for threshold in result["thresholds"]):
        return "FAIL"
    lacking = _checks(result, "unknown") or result["disconnected"] or result["sent"] < result["scheduled"]
    return "UNKNOWN" if lacking else "PASS"


def last_words(client: Client) -> str:
    """What a server said as it closed a connection, in any protocol; or what the system says of that."""
    if not client.failure:
        return ""
    ends = len(client.order) - LAST_WORDS_LINES
    said = [line for place, line in client.other_lines() if place >= max(ends, client.settled, 0)]
    return last_line(said[-1]) if said and LAST_WORDS.fullmatch(said[-1]) else client.failure


def dropped_slow(client: Client) -> bool:
    """Whether a server dropped a client because that did not read: which is the load tester's fault."""
    return bool(client.failure) and (client.slow or bool(SLOW.search(last_words(client))))


def conditions(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """What was run, where, and against what."""
    return {
        "loadtest": VERSION,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["loadtest.py", *map(shlex.quote, args.argv)]),
        "machine": {
            "python": f"{platform.python_implementation()} {platform.python_version()}" + " free-threaded" * (not GIL),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpus": os.cpu_count(),
        },
        "target": {
            "name": run.target.name,
            "host": None if run.target.others else run.target.host,
            "port": None if run.target.others else run.target.port,
            "proto": run.load.protocol,
        },
        "load": {key: getattr(run.load, key) for key in LOAD_KEYS},
    }


def clock(run: Run) -> str:
    """How arrival was measured, and of how many receivers."""
    source = "the kernel's (SO_TIMESTAMPNS)" if KERNEL_CLOCK and not run.load.tls else "that of recv"
    return source if run.turns.groups == 1 else f"{source}, of one receiver in {run.turns.groups} at a time, in turn"


def failures(run: Run) -> list[str]:
    """Why clients were thrown out, and what else went wrong."""
    thrown = []
    for words, times in collections.Counter(filter(None, map(last_words, run.clients))).most_common():
        thrown.append(f"{count(times)} disconnected: {with_hint(words)}")
    slow = sum(map(dropped_slow, run.clients))
    if slow:
        thrown.append(
            f"{count(slow)} of these had not read all: the load tester was too slow for this load, not the server"
        )
    passed = throttled(run, run.sent())
    if passed:
        asked = f"{count(passed)} of {count(run.load.rate)} messages/s"
        thrown.append(
            f"only {asked} were passed on: a limit is reached, or the server throttles; perhaps {FLOOD_CONTROL}"
        )
    if run.throttled:
        thrown.append(f"messages were still trickling in {DRAIN_S:.0f} s after the last send; perhaps {FLOOD_CONTROL}")
    return thrown


def throttled(run: Run, sent: int) -> float | None:
    """Messages/s that a server passed on, if that took clearly longer than sending them should have taken."""
    asked = run.load.warmup_s + run.load.duration_s
    slow = bool(run.load.rate) and not run.interrupted and run.elapsed_s > THROTTLED * asked + PAUSE_S
    return sent / run.elapsed_s if slow else None


def joining(run: Run) -> dict[str, float | None]:
    """How joining went."""
    took = summarize(array("d", (client.joined_s * 1e3 for client in run.clients)))
    rate = len(run.clients) / run.joining_s if run.joining_s else None
    return {"connects_per_s": rate, "all_joined_s": run.joining_s or None, **{key: took[key] for key in ("p50", "p99")}}


def generator(
    run: Run, sample: Sample, floor: dict[str, float] | None, found: dict[str, float | None]
) -> dict[str, Any]:
    """What the load tester itself adds: lateness of its sends (ms), its share of a core, and whether it limits."""
    late = array("d", [0.0])
    if run.load.rate:
        late = array("d", ((at - due) / 1e6 for at, due in zip(sample.times, sample.due) if at)) or late
    summary, share = summarize(late), run.cpu_s / max(run.elapsed_s, 1e-9)
    why = []
    if (summary["p99"] or 0.0) > max(LATE_MS, (found.get("p99") or math.inf) / 3):
        why.append(f"one send in a hundred was more than {summary['p99']:.1f} ms late, which p99 counts as well")
    if run.gate.held:
        why.append("its receivers could not keep up, so its senders waited for them")
    if share > 0.9 * (os.cpu_count() or 1):
        why.append(f"it used {share:.1f} of {os.cpu_count()} cores")
    if floor and (found.get("p50") or 0.0) < 1.2 * floor["p50"]:
        why.append("a bare reflector does no better")
    if sample.rough > ROUGH * len(sample.late):
        why.append(
            f"{count(sample.rough)} arrivals are timed to {duration(run.read_every * 1000)} only, and as too late"
        )
    if any(map(dropped_slow, run.clients)):
        why.append("its receivers read too slowly, so they were dropped")
    keys = {"late_p50": "p50", "late_p99": "p99", "late_max": "max"}
    return {
        **{key: summary[name] for key, name in keys.items()},
        "cpu_share": share,
        "floor": floor,
        "limited": bool(why),
        "why": "; ".join(why),
    }


def cost(run: Run, delivered: int) -> dict[str, float] | None:
    """What the run cost the server, where its process can be seen."""
    if not run.before or not run.afterwards:
        return None
    cpu_s = run.afterwards["cpu_s"] - run.before["cpu_s"]
    return {
        "pid": run.target.pid,
        "cpu_s": cpu_s,
        "cpu_ms_per_1000": cpu_s * 1e6 / max(delivered, 1),
        "rss_mb": run.afterwards["rss_mb"],
        "threads": run.afterwards["threads"],
    }


# -----------------------------------------------------------------------------
# command line
# -----------------------------------------------------------------------------


def progress(run: Run) -> None:
    """One line on a terminal that shows how it goes."""
    elapsed = (now_ns() - run.begin) / 1e9
    if not sys.stderr.isatty() or elapsed < 0:
        return
    sent, delivered = run.sent(), run.delivered()
    recent = array("d")
    for client in run.clients[:: max(1, len(run.clients) // 50)]:
        for chunk in client.chunks[-5:]:
            number = client.order[chunk.first]
            if chunk.exact and run.load.rate and number < run.total:
                recent.append((chunk.moment - run.due(number)) / 1e6)
    p99 = f", p99 {duration(summarize(recent)['p99'] or 0.0)}" if recent else ""
    behind = run.expected() - delivered
    line = f"{elapsed:5.1f} s, sent {sent:,}, delivered {delivered:,}{p99}, {max(behind, 0):,} under way or lost"
    print(f"\r{line:<79.79}", end="", file=sys.stderr, flush=True)


def one(
    target: Target, load: Load, args: argparse.Namespace, floor: dict[str, float] | None = None, fault: str = ""
) -> dict[str, Any]:
    """Runs a load against a target, perhaps with a fault in its second half, and analyses it."""
    disturbance: Disturbance | None = None

    def turn(run: Run) -> None:
        if disturbance:
            disturbance.watch(run)
        if not args.quiet:
            progress(run)

    run = Run(load, target, turn)
    run.faulty = bool(fault)
    disturbance = Disturbance(fault, load, target, args) if fault else None
    again: Return | None = None
    try:
        run.execute()
        if args.reconnect and not run.interrupted:
            again = Return(load, target, turn)
            again.execute()
    finally:
        fate = disturbance.end() if disturbance else None
    if sys.stderr.isatty() and not args.quiet:
        print(f"\r{'':79}\r", end="", file=sys.stderr, flush=True)
    if run.interrupted or again and again.interrupted:
        args.interrupted = True
    result = analyse(run, args, floor, again)
    if fault:
        result["fault"] = {"name": fault, "what": FAULTS[fault].what, "peers": FAULTS[fault].peers, "fate": fate}
    return result


@contextlib.contextmanager
def open_target(kind: str, value: str, args: argparse.Namespace) -> Iterator[Target]:
    """The target that arguments name, while it is needed: ("command", ...) or ("address", lines of HOST:PORT)."""
    if kind == "command":
        target = Target("", 0, split(value))
    else:
        parts = [item.rpartition(":") for item in value.split("\n")]
        try:
            first, *others = [(host.strip("[]"), int(port)) for host, _, port in parts]
        except ValueError:
            raise FatalError(f"{escape_controls(value)}: not HOST:PORT") from None
        target = Target(*first, pid=args.pid, others=others)
    try:
        yield target
    finally:
        target.stop()


def split(command: str) -> list[str]:
    """A command in words, as the platform has them; raises FatalError."""
    lexer = shlex.shlex(command, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    if sys.platform == "win32":
        lexer.escape, lexer.quotes = "", '"'
    try:
        words = list(lexer)
    except ValueError as error:
        raise FatalError(f"--server-command {command!r}: {error}") from None
    if not words:
        raise FatalError("--server-command is empty")
    return words


def targets(args: argparse.Namespace) -> list[tuple[str, str]]:
    """What is to be tested, one or two; raises FatalError."""
    found = [("command", command) for command in args.server_command]
    network = [f"{args.host}:{args.port}"] * bool(args.port) + args.target
    if network:
        found.append(("address", "\n".join(network)))
    if not args.port and args.host != "127.0.0.1":
        raise FatalError("--host needs --port")
    if (len(network) > 1 or args.faults) and args.proto != "irc":
        raise FatalError("several --target, and --faults, need --proto irc")
    if not found:
        chat = os.path.join(os.path.dirname(os.path.abspath(__file__)), "chat.py")
        limits = ["--exempt", "127.0.0.1/32", "--password-file", args.password_file] if args.faults else []
        limits += ["--tls-cert", args.certificate] if args.faults and args.certificate else []
        found.append(("command", chat_server(chat, *limits)))
    if args.versus:
        found.append(args.versus)
    if args.reconnect and (args.faults or not args.rate):
        raise FatalError("--reconnect needs a --rate, and goes without --faults")
    if len(found) > (1 if args.sweep or args.faults else 2) or args.pid and found[0][0] != "address":
        raise FatalError("one target can be swept or have faults, two can be compared, and --pid goes with --port")
    return found


def chat_server(chat: str, *more: str) -> str:
    """The command that starts the server of a chat.py."""
    return join([sys.executable, chat, "server", "--port", "{port}", *more])


def join(words: list[str]) -> str:
    """The command that `split` takes apart."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def calibrate(load: Load, args: argparse.Namespace) -> dict[str, float] | None:
    """p50 and p99 in ms of the same load against the reflector: what nobody can go below here."""
    command = join([sys.executable, os.path.abspath(__file__), "--reflect", "{port}"])
    with open_target("command", command, args) as target:
        bare = argparse.Namespace(**{**vars(args), "reconnect": False})
        found = one(target, load._replace(protocol="irc", tls=False), bare)["latency"]["corrected"]
    return {key: found[key] for key in ("p50", "p99")} if found["samples"] else None


@contextlib.contextmanager
def fault_requirements(args: argparse.Namespace) -> Iterator[None]:
    """What the server that is started for faults needs: a password, and with openssl a certificate of its own."""
    args.certificate = ""
    with tempfile.TemporaryDirectory() as folder:
        if args.faults and not args.password_file and not (args.port or args.target or args.server_command):
            args.password_file = os.path.join(folder, "password")
            with open(args.password_file, "w", encoding="ascii") as file:
                print(random.SystemRandom().getrandbits(64), file=file)
            openssl, made = shutil.which("openssl"), os.path.join(folder, "tls.pem")
            kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=loadtest"]
            command = [openssl or "", "req", "-x509", *kind, "-keyout", made, "-out", made]
            if openssl and not subprocess.run(command, capture_output=True, check=False).returncode:
                args.certificate = made
        yield


def run_faults(load: Load, args: argparse.Namespace) -> dict[str, Any]:
    """Each fault in turn, some rounds of that."""
    ((kind, value),) = targets(args)
    results: list[dict[str, Any]] = []
    for fault in args.faults * args.rounds:
        if not args.interrupted:
            with open_target(kind, value, args) as target:
                results.append(one(target, load, args, fault=fault))
    return {"results": results, "sweep": None, "versus": None, "faults": summarize_faults(results)}


def summarize_faults(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each fault did to the others: sums and medians of its rounds; the fate of its disturbers in the last."""
    rows = []
    for name in dict.fromkeys(result["fault"]["name"] for result in results):
        rounds = [result for result in results if result["fault"]["name"] == name]
        counts = [(item["check"], item["count"]) for result in rounds for item in result["checks"]]
        p99: list[float | None] = []
        for half in ("undisturbed", "disturbed", "newcomers"):
            known = [_at(result, "latency", half, "p99") for result in rounds]
            p99.append(None if None in known else statistics.median(known))
        row: dict[str, Any] = {
            **rounds[-1]["fault"],
            "rounds": len(rounds),
            "lost": sum(number for check, number in counts if check == "loss"),
            "wrong": sum(number for check, number in counts if check != "loss"),
            "undisturbed": p99[0],
            "disturbed": p99[1],
            "newcomers": p99[2],
            "ratio": p99[1] / p99[0] if p99[0] and p99[1] else None,
            "limited": any(result["generator"]["limited"] for result in rounds),
        }
        rows.append({**row, "verdict": fault_verdict(row, [result["verdict"] for result in rounds])})
    return rows


def document(load: Load, args: argparse.Namespace) -> dict[str, Any]:
    """All that the arguments ask for: one result, a sweep, two targets in turn, or faults."""
    if args.faults:
        return run_faults(load, args)
    found = targets(args)
    rounds = args.rounds if len(found) > 1 else 1
    results: list[dict[str, Any]] = []
    for turn in range(rounds):
        for size in args.sweep or [load.clients]:
            this = load._replace(clients=size, senders=min(load.senders, size))
            floor = calibrate(this, args) if args.calibrate and not args.interrupted else None
            pair = {}
            for place in sorted(range(len(found)), reverse=bool(turn % 2)):  # who is first may matter
                if not args.interrupted:
                    with open_target(*found[place], args) as target:
                        pair[place] = one(target, this, args, floor)
            tell_apart(pair)
            results += [pair[place] for place in sorted(pair)]
    if args.interrupted:
        return {"results": results, "sweep": None, "versus": None, "faults": None}
    names = list(dict.fromkeys(result["target"]["name"] for result in results))
    return {
        "results": results,
        "sweep": sweep_result(results) if args.sweep else None,
        "versus": compare_result(names, results, rounds) if len(names) > 1 else None,
        "faults": None,
    }


def tell_apart(pair: dict[int, dict[str, Any]]) -> None:
    """Gives the second of two results another name if it has the first's."""
    if len(pair) == 2 and pair[0]["target"]["name"] == pair[1]["target"]["name"]:
        pair[1]["target"]["name"] += " (2)"


def sweep_result(results: list[dict[str, Any]]) -> dict[str, Any]:
    """How latency and cost grow with the number of clients; the exponent is that of the server's CPU per message, of
    the points that the load tester did not limit.
    """
    points = []
    for result in results:
        latency, cpu = result["latency"]["corrected"], (result["server"] or {}).get("cpu_ms_per_1000")
        figures = latency.get("p50"), latency.get("p99"), cpu, result["deliveries_per_s"], _limited(result)
        points.append([result["load"]["clients"], *figures])
    growth = [(point[0], point[0] * (point[3] or 0.0)) for point in points if not point[5]]
    return {"points": points, "exponent": fit_exponent(growth)}


def compare_result(names: list[str], results: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """What two targets did in their rounds, and its ratio, first to second: each median, lowest, highest."""
    compared: dict[str, Any] = {"names": names[:2], "rounds": rounds, "ratios": {}, "figures": {}, "p": {}}
    for measure in MEASURES[:-1]:
        one, other = ([measured(measure, r) for r in results if r["target"]["name"] == name] for name in names[:2])
        pairs = [(a, b) for a, b in zip(one, other) if a is not None and b is not None]
        figures = [figure(value for value in values if value is not None) for values in (one, other)]
        if figures[0][0] is None and figures[1][0] is None:
            continue
        ratios = [a / b for a, b in pairs if b]
        ratio = [figures[0][0] / figures[1][0], min(ratios), max(ratios)] if ratios else [None] * 3
        compared["figures"][measure] = [*figures, ratio]
        if ratios:
            compared["ratios"][measure], compared["p"][measure] = ratio[0], sign_test(pairs)
    return compared


def figure(values: Iterable[float]) -> list[Any]:
    """Median, lowest and highest; None of nothing."""
    known = list(values)
    return [statistics.median(known), min(known), max(known)] if known else [None] * 3


def exit_code(found: dict[str, Any], args: argparse.Namespace) -> int:
    """0 passed, 1 violation or not known, 3 the load tester was the limit (--strict), 99 threshold, 130 stopped."""
    results = found["results"]
    verdict = worst(item["verdict"] for item in [*results, *(found["faults"] or [])])
    if verdict == "FAIL":
        return 1 if any(_checks(result, "FAIL") for result in results) else 99
    if args.interrupted or verdict != "PASS":
        return 130 if args.interrupted else 1
    return 3 if args.strict and any(result["generator"]["limited"] for result in results) else 0


def int_between(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `low` to `high`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return convert


def non_negative(text: str) -> float:
    """The type of a rate or a time: not negative, and finite."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")


def address(text: str) -> str:
    """The type of --target."""
    host, _, port = text.rpartition(":")
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    int_between(1, 65535)(port)
    return text


def rival(text: str) -> tuple[str, str]:
    """The type of --versus: what `open_target` takes."""
    if os.path.isfile(text):
        return "command", chat_server(text)
    try:
        return "address", address(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a file nor HOST:PORT") from None


def numbers(text: str) -> list[int]:
    """The type of --sweep."""
    return [int_between(2, 100_000)(item) for item in text.split(",")]


def checks(text: str) -> list[str]:
    """The type of --check."""
    return choice(text, CHECKS)


def faults(text: str) -> list[str]:
    """The type of --faults."""
    return choice(text, FAULTS)


def choice(text: str, known: Collection[str]) -> list[str]:
    """Some of the known names."""
    names = text.split(",")
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"known are {', '.join(known)}")
    return names


def threshold(text: str) -> str:
    """The type of --fail-if."""
    try:
        parse_threshold(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


JSON_HELP = """\
--json writes `schema` (its version), `results`, one for each run, and `sweep`,
`versus` and `faults`.
What is not known is null. A result has
  loadtest (its version), when, command, machine, target, load
  join         connects_per_s, all_joined_s, p50 and p99 in ms
  scheduled, sent (messages), expected, deliveries (each counted once),
  elapsed_s, deliveries_per_s, messages_per_s
  timed        due (deliveries of the turns of receivers), of these missing, and
               rough: timed to a fraction of a second, and as later than they were
  latency      corrected, uncorrected, complete: each has samples, and p50, p90,
               p99, p99.9 and max in ms, null where too much is missing; with
               --faults also undisturbed, disturbed and newcomers; complete has
               samples only when all receivers were watched all the time
  histogram    [upper bound in ms, count]
  curve        [quantile, ms]
  over_time    [second, p50, p99, max]
  fairness     best, worst and ratio of the receivers' medians, slowest receiver
  clock        how arrival was measured
  generator    late_p50, late_p99, late_max in ms, cpu_share of one core, floor
               (of --calibrate), limited, why
  reconnect    with --reconnect, of those who were cut off: all_in_s; p50 and p99 in
               ms until one was in again; steady_s, until delivery was as before,
               or unsteady_s, for how long it was not;
               expected and deliveries of what was sent when the receiver was in
  server       pid, cpu_s, cpu_ms_per_1000 deliveries, rss_mb, threads
  checks       check, verdict, count, witness
  thresholds   text, value, exceeded
  disconnected (clients), failures (why), interrupted, throttled (messages/s)
  verdict      PASS, FAIL, UNKNOWN or INTERRUPTED
  fault        with --faults: name, what, peers, and their fate: connections,
               stayed, written (bytes), answers, closed (why, count, median
               seconds), cpu_share of one core
Each of `faults` is such a fault, with the sums of its rounds: rounds, lost,
wrong, p99 undisturbed, disturbed and of newcomers, ratio, limited, verdict.

exit codes: 0 passed; 1 a check failed, or something is not known; 2 wrong usage
or no connection; 3 the load tester was the limit (with --strict); 99 only a
--fail-if threshold, or a bound of --faults, was exceeded; 130 interrupted,
after a report
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="loadtest.py",
        description=textwrap.fill((__doc__ or "").splitlines()[0], WIDTH),
        epilog=JSON_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    load = top.add_argument_group("load").add_argument
    load("-n", "--clients", type=int_between(2, 100_000), metavar="N", default=100, help="a thread each (%(default)s)")
    load("-S", "--senders", type=int_between(1, 100_000), metavar="N", default=20, help="of the clients (%(default)s)")
    load("-r", "--rate", type=non_negative, default=100.0, help="messages/s in all; 0: as accepted (%(default)s)")
    load("-d", "--duration", type=non_negative, default=8.0, help="seconds measured (%(default)s)")
    load("-w", "--warmup", type=non_negative, default=1.0, help="seconds before that, not measured (%(default)s)")
    load("-s", "--size", type=int_between(MIN_SIZE, MAX_SIZE), metavar="N", default=64, help="bytes (%(default)s)")
    load("--seed", type=int, default=1, help="of the texts (%(default)s)")
    load("--proto", choices=("irc", "plain", "json", "ws"), default="irc", help="(%(default)s)")
    load("--channel", default="#chat", help="(%(default)s)")
    load("--connect-rate", type=non_negative, default=2000.0, help="connects/s at most (%(default)s)")
    load("--sweep", type=numbers, metavar="N,N,...", help="one run for each number of clients")
    load("--reconnect", action="store_true", help="at the end cut all off at once, and see how they come back")
    load("--faults", nargs="?", type=faults, const=list(FAULTS), metavar="NAME,...",
         help=f"one run for each fault, of {','.join(FAULTS)} (at {FAULT_LOAD['rate']:g} messages/s)")  # fmt: skip
    add_target(top)
    out = top.add_argument_group("result").add_argument
    out("--check", type=checks, default=list(CHECKS), metavar="NAME,...", help=f"of {','.join(CHECKS)}")
    out("--calibrate", action="store_true", help="first measure what a bare reflector does")
    out("--fail-if", action="append", default=[], type=threshold, metavar="'p99>50ms'", help="exit 99 then")
    out("--strict", action="store_true", help="exit 3 when the load tester itself was the limit")
    out("--json", metavar="FILE", help="everything, as told below")
    out("--html", metavar="FILE", help="one page with charts")
    out("--hdr", metavar="FILE", help="percentiles as HdrHistogram's text; FILE.2 and on for further runs")
    out("--openmetrics", metavar="FILE", help="the figures as OpenMetrics text")
    out("-q", "--quiet", action="store_true", help="no progress")
    top.add_argument("--reflect", type=int, help=argparse.SUPPRESS)
    top.add_argument("--disturb", help=argparse.SUPPRESS)
    return top


def add_target(top: argparse.ArgumentParser) -> None:
    """The arguments that tell what is tested."""
    where = top.add_argument_group("target (a chat.py server of its own, when none is given)").add_argument
    where("--host", default="127.0.0.1", help="address of a server that runs (%(default)s)")
    where("--port", type=int_between(1, 65535), metavar="PORT", help="its port")
    where("--target", action="append", default=[], type=address, metavar="HOST:PORT",
          help="the same in one; several are servers of one network, over which the clients are spread")  # fmt: skip
    where("--pid", type=int, default=0, help="its process, to see what it uses")
    where("--tls", action="store_true", help="encrypted; its certificate is not verified")
    where("--password-file", metavar="FILE", help="its password is the first line of FILE")
    where(
        "--server-command", action="append", default=[], metavar="COMMAND", help="start and test this; {port} is put in"
    )
    where("--versus", type=rival, metavar="FILE|HOST:PORT",
          help="a second target, in turn: another chat.py, or a server that runs")  # fmt: skip
    where(
        "--rounds", type=int_between(1, 1000), metavar="N", default=6, help="with two targets, or faults (%(default)s)"
    )


def load_from_args(args: argparse.Namespace) -> Load:
    """The load that the arguments describe; raises FatalError for one that cannot be."""
    most = max(args.sweep or [args.clients])
    if not args.duration or not args.connect_rate:
        raise FatalError("--duration and --connect-rate must be more than 0")
    if args.rate and args.rate * (args.warmup + args.duration) >= 1 << 31:
        raise FatalError("that are too many messages")
    password = ""
    if args.password_file:
        with open(args.password_file, encoding="utf-8", errors="surrogateescape") as file:
            password = file.readline().strip()
    raise_descriptor_limit(most + 64)
    return Load(
        args.clients, min(args.senders, args.clients), args.rate, args.duration, max(args.warmup, 0.0), args.size,
        args.seed, args.proto, args.channel, password, args.connect_rate, args.tls,
    )  # fmt: skip


def raise_descriptor_limit(needed: int) -> None:
    """Lets the process, and the server that it starts, open as many descriptors as the system permits."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):
            wanted = hard if hard != resource.RLIM_INFINITY else max(soft, needed)  # macOS takes no infinity
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        if soft != resource.RLIM_INFINITY and soft < needed:
            raise FatalError(f"{needed} descriptors are needed and {soft} allowed; raise that with ulimit -n {needed}")


def write_output(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints the report, and writes the files that were asked for."""
    outputs = [(args.json, json.dumps(found, indent=1)), (args.html, html_report(found))]
    outputs.append((args.openmetrics, openmetrics_text(found["results"])))
    for i, result in enumerate(found["results"]):
        outputs.append((args.hdr and args.hdr + f".{i + 1}" * bool(i), hdr_text(result)))
    for path, content in outputs:
        if path:
            with open(path, "w", encoding="utf-8") as file:
                file.write(content)
    shown = found["results"][-2:] if found["versus"] else found["results"]
    if found["faults"]:
        shown = [result for result in shown if result["verdict"] == "FAIL"]
    for result in shown:
        print(text_report(result), end="\n\n" if len(found["results"]) > 1 else "\n")
        for failure in result["failures"][:3]:
            print(f"loadtest.py: {failure}", file=sys.stderr)
    for key, text in (("sweep", sweep_text), ("versus", lambda _: versus_text(found)), ("faults", faults_text)):
        if found[key]:
            print(text(found[key]))


def main(argv: list[str] | None = None) -> int:
    """Runs what the arguments ask for; returns the exit code."""
    top = parser()
    args = top.parse_args(argv)
    if args.faults:
        top.set_defaults(**FAULT_LOAD)
        args = top.parse_args(argv)
    args.argv, args.interrupted = sys.argv[1:] if argv is None else argv, False
    if args.reflect:
        reflect(args.reflect)
    if args.disturb:
        return disturb(FAULTS[args.disturb], load_from_args(args), resolve(args.host, args.port))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to leave no server behind
    try:
        for path in filter(None, (args.json, args.html, args.hdr, args.openmetrics)):
            open(path, "a", encoding="utf-8").close()  # better now than after the run
        with fault_requirements(args):
            found = {"schema": SCHEMA, **document(load_from_args(args), args)}
        write_output(found, args)
        return exit_code(found, args)
    except KeyboardInterrupt:
        return 130
    except (FatalError, OSError) as failed:
        print(f"loadtest.py: {failed}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
