#!/usr/bin/env python3
"""A small chat that is one file.

    python3 chat.py server                 then join with a browser, the line below, nc, JSON or any IRC client
    python3 chat.py client --name bob

Sections, from pure to effectful; each uses only those above it:

    limits and numerics    every bound with its unit and reason; IRC's numeric replies with their texts
    names                  what a nick or a channel may be called, and when two names are one
    wire format            Message, also of several lines; parse and format a line; LineBuffer: bytes into lines;
                           split_text: a text into pieces
    text form              the sentence that a person reads ("*** bob joined"); slash commands, parsed
    web                    HTTP requests and answers; frames of WebSocket; the page
    dialects               plain lines, JSON lines, IRC, HTTP, and those in WebSocket: bytes of a line <-> Message
    history                what was said in channels: in memory, or in an SQLite file
    chat state             who is here, who is where: Session, Channel, Hub with its log; Call, a command while it runs;
                           who may connect, and how fast: AccessControl, TokenBucket
    commands               dispatch; a function for each command (JOIN, KICK, ...), in a table
    delivery               what becomes of the log: what is stored, and which bytes go to whom
    transports             TLS and WebSocket round a socket; fingerprints; wakeups
    server                 Server accepts, and its reader threads hold back who sends too fast; Mailer sends
    terminal               line editor and screen, for people
    client                 Client, a loop over its Uplink (the connection), its Rooms, its SendQueue and Typing
    handlers               what a message, or a typed command, means to the client: a function each, in two tables
    user interfaces        what a person at a terminal sees and types, or what goes through a pipe
    operator               commands of whoever runs the server, typed at its own terminal
    command line           argparse, main

Threads of the server. A reader per connection receives, splits into lines and runs commands. Each run of a command is
a Call, which changes the state and is appended to the hub's log, both under the hub's lock. The mailer alone writes to
sockets, but for the handshake of TLS: it takes the whole log, stores what is to be stored, encodes each message once
per dialect, and makes one send per recipient. The thread that serves accepts, and lets Hub.tick prompt, ping and time
out: the main thread, unless that has the operator's terminal to look after. One more thread writes the program's log,
in which all put records by log_later.

Threads of the client. The main thread runs the loop of Client, which selects over its socket and a Wakeup and owns all
state. One thread reads keys or lines and puts them into a queue; one, short-lived, dials.

The order of the log is the order in which everybody sees everything. It is a queue: readers append at one end, the
mailer takes from the other. Joins and leaves are in it, too: `Channel.members` are those at the readers' end, under the
lock, `Channel.audience` those at the mailer's end, which only the mailer uses.

The rule of the lock. `with hub:` holds it. Every command and every method of Call runs with it held; Hub says which of
its own do. No I/O happens under it, and no other lock is taken under it.
"""

from __future__ import annotations

import _thread
import argparse
import binascii
import bisect
import calendar
import cmd
import codecs
import collections
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import gc
import getpass
import hashlib
import heapq
import hmac
import http
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import pathlib
import platform
import queue
import random
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import stat
import string
import struct
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
import urllib.parse
import zlib
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Collection,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    Union,
)

if TYPE_CHECKING:  # imported where it is needed: Python can be built without it, and most servers do not use it
    import ssl

VERSION = "chat.py-0.1"
# The name of this Python, for the commands that we tell people to type. orig_argv: since 3.10.
PYTHON = os.path.basename((getattr(sys, "orig_argv", None) or [sys.executable])[0]) or "python3"
if sys.platform == "win32":
    PYTHON = "py" if shutil.which("py") else "python"

# -----------------------------------------------------------------------------
# limits and numerics
# -----------------------------------------------------------------------------

DEFAULT_PORT = 9090
IRC_PORT, IRC_TLS_PORT = 6667, 6697  # RFC 7194, section 2
DEFAULT_CHANNEL = "#chat"
SERVER_NAME = "chat.local"
SERVER_INFO = "a small chat that is one file"  # as servers describe themselves
LOOPBACK = "127.0.0.0/8,::1"

# On the wire, in bytes.
LINE_BYTES = 512  # an IRC line with CRLF and without tags: RFC 1459, section 2.3
TAG_BYTES = 4094  # tag data that a client may send: IRCv3 message-tags, "Size limit"
CLIENT_INPUT_BYTES = TAG_BYTES + 2 + LINE_BYTES  # the longest line a server accepts: "@tags line"
SERVER_INPUT_BYTES = 8191 + LINE_BYTES  # the same for a client: servers add tags of their own
LABEL_BYTES = 64  # IRCv3 labeled-response
HTTP_BYTES = 16 << 10  # of a request's head, and of its body
MAX_PARAMS = 15  # RFC 1459, section 2.3
JSON_NESTING = 32  # ours needs 1; the json module recurses in C and could run through a reader's stack
RECV_BYTES = 16 << 10  # one read
IDLE_RECV_BYTES = (
    1024  # the same where little is expected; held while a reader waits: with 4096, 9,000 took 280 MB, not 240
)

# Names, in characters; a nick also has a bound in bytes so that every prefix fits in a line.
NICK_CHARS, NICK_BYTES = 24, 64
USER_CHARS = 10
CHANNEL_CHARS, CHANNEL_BYTES = 50, 64
DECOMPOSED = 4  # characters of one that is normalised, at most; longer names are refused unseen, for NFC is quadratic
FOLDED_CHARS = DECOMPOSED * CHANNEL_CHARS  # longer text is no name, so that nothing is folded that is not ASCII
# With any prefix, a line and its numeric stay within 512; NAMES_BYTES are of names in one 353 line.
TOPIC_BYTES, NAMES_BYTES, AWAY_BYTES, REASON_BYTES, REALNAME_BYTES = 300, 300, 200, 200, 100
PASSWORD_BYTES = LINE_BYTES - len("PASS :\r\n")
MASK_BYTES, KEY_BYTES = 80, 32  # of a ban, so that MAX_MODES of them fit in a MODE line; of a channel's key

# How many, per server or per session.
AWAY_SHOWN = 100  # members of a channel, in an answer to /who
MAX_TARGETS = 4  # recipients of one PRIVMSG, and the like
# Of one message (draft/multiline). A page of PAGE_LINES of them is about `Limits.outbox`, in JSON up to 2.5 times that.
MULTILINE_BYTES, MULTILINE_LINES = 4096, 32
REPEATED_TAG_BYTES = 128  # of its client's tags, which those who do not know such messages get with each line
MAX_JOINS = 50  # channels in one JOIN or PART, and invitations that are remembered
MAX_MODES = 4  # with a parameter, in one MODE
MAX_BANS = 100  # of a channel, with exceptions
MASK_STARS = 10  # in a mask: each makes its pattern longer, which takes 0.06 ms to compile
BAN_CHECKS = 1000  # masks that one JOIN may have looked at: up to 4 us each
BANS_CACHED = 10_000  # of whom a channel remembers whether they are banned
MAX_LISTED = 1000  # channels in one LIST
MAX_MONITORED, MAX_GONE = 100, 500  # names that a client monitors; those who left, for WHOWAS
IRC_DIALECTS = 1000  # sets of capabilities that are remembered; there are few, unless somebody tries them all
NICK_CHANGES, NICK_CHANGE_S = 5, 10.0  # at once, then one each so many seconds: each is told to everybody

# Memory between a sender and a slow recipient.
# Not yet taken by the mailer; over it senders wait, which TCP passes on to them. Flooded, half of the messages take
# 0.15 s with 200, and 1.0 s with 500, because more of them wait in socket buffers; with 60 fewer get through.
LOG_HIGH_WATER = 200
LOG_ENTRIES = 20_000  # the same with answers to one session: NAMES alone may be hundreds
QUERY_ENTRIES = 500  # in the log, over which queries wait: a few ms of the mailer's time
PAUSE_S = 0.001  # between two parts of a long answer
QUERY_ROWS = 250  # of one answer under the lock at once
QUERY_BURST, QUERY_RATE = 10_000, 1000.0  # rows of answers for one address: at once, then a second
STACK_BYTES = 256 << 10  # of a reader thread; the default of 8 MiB would forbid thousands of them

# History.
REPLAY_LINES = 20  # shown to newcomers
# Kept in memory of a channel, and in all, where each LINE_BYTES characters of one count: 4 kB each at worst.
MEMORY_LINES, MEMORY_TOTAL = 1000, 50_000
STORED_TAGS, STORED_TAG_CHARS = (
    8,
    512,
)  # of a message in the history, which otherwise keeps only those that matter to us
PAGE_LINES = 100  # at most, of one answer to CHATHISTORY
DEDUP_IDS = 100  # of one client's messages, by which one that is sent again is recognised without the history
RESUME_QUEUE = 100  # private messages to one of them
BROWSERS = 1000  # addresses from which HTTP came lately
STORE_S = 1.0  # that another program may keep the file to itself, while everybody waits
PRUNE_LINES, PRUNE_S = 200, 1.0  # removed at a time, when they are too old; and how often
MIGRATED_LINES = 10_000  # the last ones of an older file, of which one that is sent again is recognised, too
CHECKED_BYTES = 64 << 20  # a file up to this is read through at the start: 0.2 s
SCANNED_LINES = 10_000  # at most, to find those of a page after the clock was set back: 10 ms
FOREGROUND_S = 1.0  # between two looks whether the shell's fg has brought a server to its terminal
OPERATORS_S = 3600.0  # after a restart a channel that all have left still waits for its operators
SAVED_CHANNELS = 10_000  # whose modes are restored at the start
SQLITE_ID = 0x63686174  # in the header of our SQLite files: "chat"
MAX_SEQUENCE = 1 << 62  # above every message's number

# Time, in seconds.
PROMPT_S = 1.0  # of silence before a person is asked for a name; IRC clients speak first
TLS_PROMPT_S = 5.0  # the same where TLS may come as well: clear text breaks a handshake that is slow to begin
FLOOD_S, FLOOD_BYTES = 10.0, 32 << 10  # who leaves so much unread for so long, while its lines wait, is dropped
WRONG_PASSWORDS, WRONG_S = 5, 60.0  # at once from one address, and how long until there may be as many again
WRONG_PAUSE_S = 1.0  # until the next line of somebody who was wrong is read
SWEEP_S = 10.0  # between two looks for addresses of which nothing need be remembered
CONNECT_INTERVAL_S = 0.5  # between connections from one address, after twice as many at once as it may have
# After so many that are accepted at once, if some of them are refused: who refuses at full speed lets nobody else have
# the interpreter. With a pause after each, those who came behind 4,000 waited for 3 s.
REJECT_PAUSE_S, MAX_ACCEPTED = 0.0005, 250
REASONS, REASON_S = 100, 0.01  # are told why at once, and then one each; the others are closed, which costs a quarter
DROPPED_PAUSE_S = 0.05  # between two looks at what somebody goes on to send who has been dropped
ERROR_PAUSE_S = 0.01  # for each line that is not understood: nonsense at full speed would take the others' turns
MAX_RESUMABLE = 1000  # sessions whose connection is lost; then the address that has most loses its oldest
RESUME_GRACE_S = 30.0  # for a client to come back before the others are told that it left
WEB_PING_S = 45.0  # longest silence on a WebSocket: nginx ends a connection after 60
GHOST_PING_S = 10.0  # for the holder of a name that somebody else asks for: a ghost does not answer
TICK_S = 0.5  # longest sleep of the timers
HANDSHAKE_S = 20.0  # for the next piece of a TLS handshake; the registration timeout ends it sooner
DRAIN_S = 3.0  # without progress, for the send queue of a connection that is closed
CLOSE_GRACE_S = 0.5  # for the peer to close, too, once it has got the last line
STOP_S = 3.0  # for the last lines to be delivered when the server stops; it is gone within 5
# Thread switch interval. Each of N threads that want to run wakes once in it, for nothing, so it grows with N: when
# 9,000 clients spoke at once, they had joined after 19 s with 1 ms, after 10 s with 50 ms.
SWITCH_S, SWITCH_CLIENT_S = 0.005, 5e-6

# The log.
LOG_QUEUE = 1000  # that wait to be written: a terminal that is stopped with Ctrl-S must not stop the chat
END_S = 1.5  # for a terminal to take the last lines
LOG_END_S = 1.0  # for the rest of them at the end
LOG_BURST, LOG_INTERVAL_S = 200, 0.125  # of one kind, at once and then one each: nobody fills our disk with complaints

# The client.
CONNECT_S = 10.0  # for a connection, and then for the server's first word
ENTER_S = 120.0  # for being let in, by a server that is not silent meanwhile
ASK_S = 30.0  # of silence before the client asks whether the server is there, and again before it gives up
JOIN_S = HISTORY_S = 10.0  # for an answer to JOIN, and to CHATHISTORY
GOODBYE_S = 3.0  # for the server to say goodbye
CLOSE_S = 0.5  # for a socket to take the last lines
CLIENT_TICK_S = 0.2  # between two looks at what is due, while something is waited for
TYPING_S, PAUSED_S = 3.0, 5.0  # between two times that we tell that we are typing; without a key until we tell a pause
TYPING_HEARD_S = 6.0  # after which somebody who has told it is not typing any more
RETRY_S, RETRY_MAX_S = 0.5, 30.0  # pause before we first connect again, and the longest; each at random less
PASSWORD_TRIES = 3  # that are asked for, as ssh does
GIVE_UP_S = 60.0  # without connection, for a pipe that ended: whoever waits for it wants an answer
FRAME_S = 0.05  # between two drawings while much arrives
MIN_PIECE = 100  # bytes of text that must fit beside a target's name
CLIENT_SENDQ, SENDQ_LOW = 1 << 20, 1 << 16  # bytes that a server may leave unread; below which we say more
SAME_NAMES = 20  # names that we try when they are taken
OLD_NICK_CHARS = 9  # which every server allows: RFC 1459, section 1.2
# Other servers throw out who speaks faster, or is further ahead of what they have read: InspIRCd reads a line each
# second, and keeps 8 KiB of others.
FLOOD_BURST, FLOOD_INTERVAL_S, UNREAD_WINDOW = 5, 0.5, 8  # lines at once, then one each so many seconds; not yet read
# What no server can make us keep or do more of: rooms, names in all of them, characters of a name or a msgid, msgids,
# messages that are held back, pages of the past.
MAX_ROOMS, MAX_MEMBERS, NAME_CHARS, SEEN_IDS, HELD_MESSAGES, HISTORY_PAGES = 50, 100_000, 100, 10_000, 1_000, 1_000
# Of messages of several lines, until they are complete; lines of each, and characters, for many may be held back.
OPEN_BATCHES, BATCH_LINES, BATCH_CHARS = 10, 300, 1 << 14
# Bytes that a chat.py is sent ahead of their echo: less than what makes it drop us. What a line has beside its text.
SEND_WINDOW, LINE_OVERHEAD = FLOOD_BYTES // 2, 100
PIPE_WINDOW = 50  # lines that a pipe sends ahead of their echo: fills no buffer, hides the round trip
NAMES_SHOWN = 20  # on entering a channel
UNREAD_KEYS = 100  # reads of keys that wait for the loop
HISTORY_LINES = 500  # typed lines that can be called back
PASTE_CHARS = 1 << 16  # at most, of one paste
PASTE_MS = 20  # so soon after each other come the keys of what is pasted into a Windows console
KEY_S = 0.5  # between the bytes of one key, at most, as in readline: a key that comes later was not typed with Alt
ANSWER_CHARS = 1000  # of an answer of the terminal; one without an end, Alt-], does not swallow more of what is typed
WAITING_ROWS = 5  # shown of our lines that are not confirmed
# Looks: parameters of Select Graphic Rendition (ECMA-48, 8.3.117). Names and marks can be read on black and on white:
# 256 colours have a contrast (WCAG 2.1) of at least 4, the 16, which differ from terminal to terminal, of 2.5.
BOLD, DIM, REVERSE, RED, MAGENTA = 1, 2, 7, 91, 95
NAME_COLOURS = tuple(f"38;5;{number}" for number in (27, 28, 30, 64, 98, 129, 130, 131, 132, 161, 163, 31))
FEW_COLOURS = ("91", "94", "95", "31")


def limit(default: float, flag: str, unit: str, text: str) -> float:
    """A field of Limits: its default, its flag, and what the help of that says."""
    found: float = dataclasses.field(default=default, metadata={"flag": flag, "unit": unit, "help": text})
    return found


@dataclasses.dataclass(frozen=True)
class Limits:
    """What clients may ask of a server, each with a flag; math.inf lifts one. Meant for a LAN and for loopback."""

    # A thread each: 9,000 were measured in under 300 MB.
    clients: float = limit(10_000, "--max-clients", "N", "connections")
    # A classroom behind one router needs more.
    per_address: float = limit(16, "--max-per-address", "N", "of them from one address")
    # A person types it, and an attacker holds a thread no longer.
    register_s: float = limit(20.0, "--register-time", "SECONDS", "to give a name")
    ping_s: float = limit(90.0, "--ping-time", "SECONDS", "silence before a client is asked whether it is there")
    pong_s: float = limit(60.0, "--pong-time", "SECONDS", "before one that does not answer is dropped")
    burst: float = limit(10, "--burst", "LINES", "at once from one client")  # enough for one that joins
    rate: float = limit(2.0, "--rate", "LINES", "each second after that; more of them wait")
    # Beyond its socket's buffer.
    outbox: float = limit(1 << 20, "--max-outbox", "BYTES", "that a client may leave unread before it is dropped")
    channels: float = limit(50, "--max-channels", "N", "that a client may be in")  # nobody follows more
    all_channels: float = limit(10_000, "--max-all-channels", "N", "channels in all")


class Numeric(NamedTuple):
    """A reply: its code on IRC, its name in JSON, its text (with {0}, {1} ... for parameters), and how people read it.

    In `form`, {0} is the recipient and {text} the last parameter; a reply without one says nothing to a person.
    """

    code: str
    name: str
    text: str = ""
    form: str = ""


class CommandError(Exception):
    """A command that cannot be done; the dispatcher replies with `numeric` and `params`.

    With a `farewell`, it then ends the session.
    """

    def __init__(self, numeric: Numeric, *params: str, farewell: str = "") -> None:
        super().__init__(numeric, *params)
        self.numeric, self.params, self.farewell = numeric, params, farewell
        self.message: Message | None = None  # as much as could be decoded of a line that could not be


RPL_WELCOME = Numeric("001", "welcome")
RPL_YOURHOST = Numeric("002", "your-host")
RPL_CREATED = Numeric("003", "created")
RPL_MYINFO = Numeric("004", "my-info")
RPL_ISUPPORT = Numeric("005", "isupport", "are supported by this server")
RPL_UMODEIS = Numeric("221", "user-mode")
RPL_LUSERCLIENT = Numeric("251", "users")
RPL_LUSEROP = Numeric("252", "operators", "operators online")
RPL_LUSERUNKNOWN = Numeric("253", "unregistered", "connections without a name yet")
RPL_LUSERCHANNELS = Numeric("254", "channel-count", "channels formed")
RPL_LUSERME = Numeric("255", "local-users")
RPL_LOCALUSERS = Numeric("265", "local-count", "Current local users {0}, max {1}")
RPL_GLOBALUSERS = Numeric("266", "global-count", "Current global users {0}, max {1}")
RPL_TRYAGAIN = Numeric("263", "too-fast", "{0} is too much now; wait a little", form="Error: {text}")
RPL_AWAY = Numeric("301", "away", form="{1} is away: {text}")
RPL_USERHOST = Numeric("302", "userhost")
RPL_ISON = Numeric("303", "ison")
RPL_UNAWAY = Numeric("305", "back", "You are no longer marked as away", form="{text}")
RPL_NOWAWAY = Numeric("306", "now-away", "You are marked as away", form="{text}")
RPL_WHOISUSER = Numeric("311", "whois-user", form="{1} is {1}!{2}@{3}: {text}")
RPL_WHOISSERVER = Numeric("312", "whois-server")
RPL_ENDOFWHO = Numeric("315", "end-of-who", "End of WHO list")
RPL_WHOISIDLE = Numeric("317", "whois-idle", "seconds idle, signon time")
RPL_WHOWASUSER = Numeric("314", "whowas-user")
RPL_ENDOFWHOIS = Numeric("318", "end-of-whois", "End of WHOIS list")
RPL_WHOISCHANNELS = Numeric("319", "whois-channels", form="{1} is in {text}")
RPL_LISTSTART = Numeric("321", "list-start", "Users  Name")
RPL_LIST = Numeric("322", "list", form="{1}: {2} here. {text}")
RPL_LISTEND = Numeric("323", "list-end", "End of LIST")
RPL_CHANNELMODEIS = Numeric("324", "channel-mode", form="The modes of {1} are: {rest}")
RPL_CREATIONTIME = Numeric("329", "channel-created")
RPL_NOTOPIC = Numeric("331", "no-topic", "No topic is set", form="{1} has no topic")
RPL_TOPIC = Numeric("332", "topic", form="The topic of {1} is: {text}")
RPL_TOPICWHOTIME = Numeric("333", "topic-by")
RPL_WHOISBOT = Numeric("335", "whois-bot", "is a bot", form="{1} is a bot")
RPL_INVITING = Numeric("341", "inviting", form="You invited {1} to {text}")
RPL_INVEXLIST = Numeric("346", "invite-exception", form="Needs no invitation to {1}: {2}, by {3}")
RPL_ENDOFINVEXLIST = Numeric("347", "end-of-invite-exceptions", "End of channel invite exception list", form="{text}")
RPL_EXCEPTLIST = Numeric("348", "ban-exception", form="Never banned from {1}: {2}, by {3}")
RPL_ENDOFEXCEPTLIST = Numeric("349", "end-of-ban-exceptions", "End of channel ban exception list", form="{text}")
RPL_VERSION = Numeric("351", "version")
RPL_WHOREPLY = Numeric("352", "who")
RPL_NAMREPLY = Numeric("353", "names", form="In {2}: {text}")
RPL_WHOSPCRPL = Numeric("354", "whox")
RPL_LINKS = Numeric("364", "link")
RPL_ENDOFLINKS = Numeric("365", "end-of-links", "End of LINKS list")
RPL_ENDOFNAMES = Numeric("366", "end-of-names", "End of NAMES list")
RPL_BANLIST = Numeric("367", "ban", form="Banned from {1}: {2}, by {3}")
RPL_ENDOFBANLIST = Numeric("368", "end-of-bans", "End of channel ban list", form="{text}")
RPL_ENDOFWHOWAS = Numeric("369", "end-of-whowas", "End of WHOWAS")
RPL_INFO = Numeric("371", "info")
RPL_MOTD = Numeric("372", "motd")
RPL_ENDOFINFO = Numeric("374", "end-of-info", "End of INFO list")
RPL_MOTDSTART = Numeric("375", "motd-start")
RPL_ENDOFMOTD = Numeric("376", "motd-end", "End of MOTD")
RPL_TIME = Numeric("391", "time")
RPL_HELPSTART = Numeric("704", "help", form="{text}")
RPL_HELPTXT = Numeric("705", "help", form="{text}")
RPL_ENDOFHELP = Numeric("706", "end-of-help", "End of HELP")

RPL_MONONLINE = Numeric("730", "online")
RPL_MONOFFLINE = Numeric("731", "offline")
RPL_MONLIST = Numeric("732", "monitored")
RPL_ENDOFMONLIST = Numeric("733", "end-of-monitored", "End of MONITOR list")
ERR_MONLISTFULL = Numeric("734", "too-many-monitored", "Monitor list is full")

ERR_NOSUCHNICK = Numeric("401", "no-such-user", "nobody here is called {0}")
ERR_NOSUCHSERVER = Numeric("402", "no-such-server", "no server here is called {0}")
ERR_NOSUCHCHANNEL = Numeric("403", "no-such-channel", "there is no channel {0}")
ERR_CANNOTSENDTOCHAN = Numeric("404", "cannot-send", "only members may write to {0}")
ERR_MODERATED = ERR_CANNOTSENDTOCHAN._replace(text="{0} is moderated: only who has a rank may write there")
ERR_SILENCED = ERR_CANNOTSENDTOCHAN._replace(text="you are banned from {0}, so you cannot write there")
ERR_NOCTCP = ERR_CANNOTSENDTOCHAN._replace(text="no CTCP but ACTION, which is /me, may be sent to {0}")
ERR_TOOMANYCHANNELS = Numeric("405", "too-many-channels", "{0} would be one channel too many")
ERR_WASNOSUCHNICK = Numeric("406", "was-no-such-user", "nothing is known of {0}")
ERR_TOOMANYTARGETS = Numeric("407", "too-many-targets", "that is too many names in one command")
ERR_NOORIGIN = Numeric("409", "no-origin", "PING needs a token")
ERR_INVALIDCAPCMD = Numeric("410", "invalid-cap", "CAP knows LS, LIST, REQ and END")
ERR_NORECIPIENT = Numeric("411", "no-recipient", "to whom?")
ERR_NOTEXTTOSEND = Numeric("412", "no-text", "there is no text to send")
ERR_TOOMANYMATCHES = Numeric("416", "too-many-matches", f"only the first {MAX_LISTED} channels are listed")
ERR_INPUTTOOLONG = Numeric("417", "too-long", "that line is too long; send it in pieces")
ERR_UNKNOWNCOMMAND = Numeric("421", "unknown-command", "{0} is not a command here")
ERR_NONICKNAMEGIVEN = Numeric("431", "no-name", "which name?")
ERR_ERRONEUSNICKNAME = Numeric(
    "432",
    "bad-name",
    "a name is a letter, then letters, digits or _[]{{}}|^`-, all of one script,"
    f" at most {NICK_CHARS} long; choose another",
)
ERR_NICKNAMEINUSE = Numeric("433", "name-taken", "that name is taken; choose another")
ERR_NICKTOOFAST = Numeric("438", "name-too-fast", "too many name changes; wait a little")
ERR_USERNOTINCHANNEL = Numeric("441", "user-not-in-channel", "{0} is not in {1}")
ERR_NOTONCHANNEL = Numeric("442", "not-in-channel", "you are not in {0}")
ERR_NOWHERE = ERR_NOTONCHANNEL._replace(text="you are in no channel; /join one first")
ERR_USERONCHANNEL = Numeric("443", "user-in-channel", "{0} is in {1} already")
ERR_NOTREGISTERED = Numeric("451", "not-joined", "say who you are first")
ERR_NEEDMOREPARAMS = Numeric("461", "too-few-parameters", "{0} needs more than that")
ERR_ALREADYREGISTERED = Numeric("462", "already-joined", "you have said who you are")
ERR_PASSWDMISMATCH = Numeric("464", "wrong-password", "that is not the password")
ERR_NO_PASSWORD = ERR_PASSWDMISMATCH._replace(text="a password is needed to join")
ERR_YOUREBANNEDCREEP = Numeric("465", "banned", "you are banned from this server")
ERR_CHANNELISFULL = Numeric("471", "channel-full", "{0} has as many members as it may have")
ERR_UNKNOWNMODE = Numeric("472", "unknown-mode", "{0} is not a channel mode here")
ERR_INVITEONLYCHAN = Numeric("473", "invite-only", "only who was invited may join {0}")
ERR_BANNEDFROMCHAN = Numeric("474", "banned-from-channel", "you are banned from {0}")
ERR_BADCHANNELKEY = Numeric("475", "bad-key", "{0} has a key: join it with the right one")
ERR_BADCHANMASK = Numeric(
    "476", "bad-channel", f"a channel is # and up to {CHANNEL_CHARS - 1} printable characters without space or comma"
)
ERR_BADCHANNAME = ERR_NOSUCHCHANNEL._replace(text=ERR_BADCHANMASK.text)
ERR_BANLISTFULL = Numeric("478", "too-many-bans", f"{{0}} has {MAX_BANS} bans and exceptions; remove one first")
ERR_NOPRIVILEGES = Numeric("481", "no-privileges", "nobody is operator of this server")
ERR_CHANOPRIVSNEEDED = Numeric("482", "not-operator", "only an operator of {0} may do that")
ERR_NOOPERHOST = Numeric("491", "no-operators", "nobody can become operator of this server")
ERR_UMODEUNKNOWNFLAG = Numeric("501", "unknown-user-mode", "that user mode is not known")
ERR_USERSDONTMATCH = Numeric("502", "not-you", "only your own modes can be seen")
ERR_HELPNOTFOUND = Numeric("524", "no-help", "there is no help for {0}; HELP alone lists what there is")
ERR_INVALIDMODEPARAM = Numeric("696", "bad-mode-parameter", "mode {1} cannot be set to that")

# Replies of the IRCv3 standard-replies form: FAIL <command> <code> :<text>.
FAIL_INVALID_UTF8 = Numeric("FAIL", "invalid-utf8", "that line is not UTF-8 text")
FAIL_BAD_CHARACTER = Numeric("FAIL", "bad-character", "a line cannot contain NUL, CR or a line break")
FAIL_BAD_JSON = Numeric("FAIL", "bad-json", "that line is not a JSON object")
FAIL_BAD_TYPE = Numeric("FAIL", "unknown-type", "type is join, chat, private, leave, history, ping or command")
FAIL_BAD_FIELD = Numeric("FAIL", "bad-field", "{0} must be a string")
FAIL_BAD_TOKEN = FAIL_BAD_FIELD._replace(text="{0} must have 16 to 64 characters")
FAIL_BAD_SLASH = Numeric("FAIL", "bad-command", "{0}")
FAIL_INVALID_REALNAME = Numeric("FAIL", "invalid-realname", f"a real name has 1 to {REALNAME_BYTES} bytes")
FAIL_CANNOT_STORE = Numeric("FAIL", "cannot-store", "not said, because it cannot be stored: {0}")
FAIL_CANNOT_REMOVE = FAIL_CANNOT_STORE._replace(text="not removed, because that cannot be stored: {0}")
# IRCv3 draft/chathistory, "Errors and Warnings"; their parameters stand before the text.
FAIL_INVALID_PARAMS = Numeric("FAIL", "invalid-params", "these are not parameters of CHATHISTORY")
FAIL_INVALID_TARGET = Numeric("FAIL", "invalid-target", "only members may read what was said there")
FAIL_MESSAGE_ERROR = Numeric("FAIL", "message-error", "what was said cannot be read now")
FAIL_UNKNOWN_COMMAND = Numeric(
    "FAIL", "unknown-command", "CHATHISTORY knows LATEST, BEFORE, AFTER, AROUND, BETWEEN, TARGETS"
)
# IRCv3 draft/message-redaction, "Errors"; the same holds for their parameters.
FAIL_REDACT_TARGET = FAIL_INVALID_TARGET._replace(text="only members may remove what was said there")
FAIL_REDACT_FORBIDDEN = Numeric("FAIL", "redact-forbidden", "only its author and operators may remove a message")
FAIL_UNKNOWN_MSGID = Numeric("FAIL", "unknown-msgid", "there is no such message any more")
FAIL_MULTILINE = Numeric("FAIL", "multiline-invalid", "that is not how a message of several lines is sent")
FAIL_MULTILINE_TARGET = Numeric("FAIL", "multiline-invalid-target", "all lines of a message have one recipient")
FAIL_MULTILINE_BYTES = Numeric("FAIL", "multiline-max-bytes", f"a message has at most {MULTILINE_BYTES} bytes")
FAIL_MULTILINE_LINES = Numeric("FAIL", "multiline-max-lines", f"a message has at most {MULTILINE_LINES} lines")

NUMERICS = {item.code: item for item in list(globals().values()) if isinstance(item, Numeric) and item.code != "FAIL"}

# -----------------------------------------------------------------------------
# names
# -----------------------------------------------------------------------------

# Scripts that one language writes together: Unicode Technical Standard 39, section 5.2.
MIXED_SCRIPTS = ({"CJK", "HIRAGANA", "KATAKANA"}, {"CJK", "HANGUL"}, {"CJK", "BOPOMOFO"})
# Letters and marks that show nothing (Default_Ignorable_Code_Point), with which two names would look like one.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
NICK_SYMBOLS = "_[]{}|^`"
ASCII_NICK = re.compile(rf"[A-Za-z_\[\]{{}}|^`][\w\[\]{{}}|^`-]{{0,{NICK_BYTES - 1}}}", re.ASCII)
CHANNEL_TYPES = "#&+!"  # RFC 2811, section 2.1; our server has # only
CHANNEL_STARTS = tuple(CHANNEL_TYPES + "~@%")  # with STATUSMSG, @#chat is the operators of #chat
CASEMAPPINGS = {"ascii": ("", ""), "rfc1459": ("[]\\~", "{}|^"), "rfc1459-strict": ("[]\\", "{}|")}


def fold(name: str) -> str:
    """The form in which names are compared: two that fold alike are the same name to everybody."""
    if name.isascii():
        return name.lower()
    if len(name) > FOLDED_CHARS:
        return name
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def folding(mapping: str) -> Callable[[str], str]:
    """How an IRC server compares names, by its CASEMAPPING; where we do not know that, as we do."""
    if mapping not in CASEMAPPINGS:
        return fold
    upper, lower = CASEMAPPINGS[mapping]
    table = str.maketrans(string.ascii_uppercase + upper, string.ascii_lowercase + lower)
    return lambda name: name.translate(table)


def is_channel(target: str) -> bool:
    """Whether a message's target is a channel, or those of a rank in one: no nick, on any server, begins like them."""
    return target.startswith(CHANNEL_STARTS)


def script(char: str) -> str:
    """The script of a letter, mark or digit by the first word of its Unicode name; '' when any script uses it."""
    if char.isascii() and not char.isalpha():
        return ""
    word = unicodedata.name(unicodedata.normalize("NFKC", char)[0], "?").replace("-", " ").split(" ")[0]
    return {"COMBINING": "", "IDEOGRAPHIC": "CJK"}.get(word, word)


def is_nick(nick: str) -> bool:
    """Whether a nick has the characters it may have, all of one script, and at most NICK_BYTES of them."""
    if nick.isascii():  # as most are: MONITOR has a hundred in a line
        return bool(ASCII_NICK.fullmatch(nick))
    scripts = {script(char) for char in nick} - {""}
    return (
        (nick[:1].isalpha() or nick[:1] in tuple(NICK_SYMBOLS))
        and all(
            c.isalpha() or c.isdecimal() or c in NICK_SYMBOLS + "-" or unicodedata.category(c)[0] == "M" for c in nick
        )
        and len(nick.encode()) <= NICK_BYTES
        and not INVISIBLE.search(nick)
        and (len(scripts) <= 1 or any(scripts <= mixed for mixed in MIXED_SCRIPTS))
    )


def with_channel_type(name: str) -> str:
    """A channel's name as people may write it: without a sign it is one with #."""
    return name if name.startswith(tuple(CHANNEL_TYPES)) else f"#{name}"


def check_nick(nick: str) -> str:
    """The NFC form of `nick`; raises CommandError where it is none (DESIGN: one script, 24 characters, 64 bytes).

    What it is compared by must be a nick, too: U+FDFA folds to 18 characters with spaces.
    """
    if len(nick) <= DECOMPOSED * NICK_CHARS:
        normal = unicodedata.normalize("NFC", nick)
        if len(normal) <= NICK_CHARS and is_nick(normal) and is_nick(fold(normal)):
            return normal
    raise CommandError(ERR_ERRONEUSNICKNAME, nick)


def check_channel(name: str) -> str:
    """The NFC form of a channel's name; raises CommandError where it is none."""
    normal = unicodedata.normalize("NFC", name) if len(name) <= DECOMPOSED * CHANNEL_CHARS else ""
    if not (
        normal.startswith("#")
        and normal.isprintable()
        and len(normal) <= CHANNEL_CHARS
        and len(normal.encode()) <= CHANNEL_BYTES
        and not INVISIBLE.search(normal)
        and not set(normal) & set(" ,")
    ):
        raise CommandError(ERR_BADCHANNAME if name.startswith("#") else ERR_BADCHANMASK, name)
    return normal


def normalize_password(password: str) -> str:
    """A password as it is compared: its NFC form (RFC 8265, section 4.2.2), without the byte-order mark of a file."""
    return unicodedata.normalize("NFC", password.lstrip("\ufeff"))


def next_nick(nick: str, size: int = NICK_CHARS) -> str:
    """The name of at most `size` characters to try when `nick` is taken: bob, bob2, bob3 ..."""
    stem = re.sub("[0-9]{1,9}$", "", nick)  # a server may have given us digits without end
    number = str(int(nick[len(stem) :] or 1) + 1)
    room = size - len(number), NICK_BYTES - len(number)
    return stem[: room[0]].encode()[: room[1]].decode(errors="ignore") + number


def simpler_nick(nick: str) -> str:
    """The name to try when `nick` is refused: José, Jose; or a shorter one. '' where that would be no name."""
    if not nick.isascii():
        return unicodedata.normalize("NFKD", nick[:NAME_CHARS]).encode("ascii", "ignore").decode().lstrip("0123456789-")
    stem = nick.rstrip("0123456789")
    return stem[: max(OLD_NICK_CHARS - len(nick) + len(stem), 0)] + nick[len(stem) :]


def is_word(text: str, size: int) -> bool:
    """Whether `text` can stand as a parameter anywhere in a line, and in a list, with at most `size` bytes."""
    apart = text[:1] in ("", ":") or set(text) & set(" ,")
    return not apart and text.isprintable() and len(text.encode()) <= size


def full_mask(mask: str) -> str:
    """A mask of names as nick!user@host, with * for what it does not tell."""
    if "!" not in mask:
        mask = f"*!{mask}" if "@" in mask else f"{mask}!*"
    return mask if "@" in mask else f"{mask}@*"


def mask_pattern(mask: str) -> re.Pattern[str]:
    """A mask as a pattern for `fullmatch`: * stands for any characters, ? for one; raises ValueError where it is too
    long or has too many *.

    What stands between two * is matched where it is first found, and nowhere else: a group in a lookahead is not tried
    again (Python has no atomic groups before 3.11). So time grows with the text, not with a power of it.
    """
    mask = re.sub(r"[*?]*\*[*?]*", lambda run: "?" * run[0].count("?") + "*", mask)
    head, *rest = ("".join("." if char == "?" else re.escape(char) for char in piece) for piece in mask.split("*"))
    if len(mask) > MASK_BYTES or len(rest) > MASK_STARS:
        raise ValueError("a mask of too many parts")
    middle = "".join(rf"(?=(.*?{piece}))\{number}" for number, piece in enumerate(rest[:-1], 1))
    return re.compile(f"{head}{middle}.*{rest[-1]}" if rest else head, re.DOTALL)


@functools.lru_cache(maxsize=100)
def search_pattern(mask: str) -> re.Pattern[str]:
    """The same of a mask that is only searched with, for folded text; one that is too long matches nothing."""
    try:
        return mask_pattern(fold(mask))
    except ValueError:
        return re.compile("(?!)")


# -----------------------------------------------------------------------------
# wire format
# -----------------------------------------------------------------------------

NO_TAGS: Mapping[str, str] = {}
TAG_ESCAPES = {"\\": "\\\\", ";": "\\:", " ": "\\s", "\r": "\\r", "\n": "\\n"}  # IRCv3 message-tags, "Escaping values"
TAG_UNESCAPES = {":": ";", "s": " ", "r": "\r", "n": "\n"}
CURRENT_CHANNEL = "*"  # as a target: the one channel that the sender is in
TYPING_TAG = "+typing"  # on TAGMSG: active, paused or done
ID_TAG = "+chat.py/id"  # on PRIVMSG: names it to its sender before it has a msgid
BY_TAG = "chat.py/by"  # only in the history: Session.identity of the author, to whom that id belongs
AUTHOR_TAG = "chat.py/author"  # on REDACT: the nick of whose message is removed
NO_REPLAY_TAG = "chat.py/no-replay"  # on JOIN of one who asks for the history
REPLAYED_TAG = "chat.py/replayed"  # on what was said before, for clients that did not ask
COUNT_TAG = "chat.py/here"  # on JOIN: how many are in the channel now
FOR_TAG = "chat.py/for"  # only in the log: the capability without which an IRC client is not told
LINES_TAG = "chat.py/lines"  # never sent: see join_lines
CONCAT_TAG = "draft/multiline-concat"  # on a line of a multiline batch: it goes on the line before


class Message(NamedTuple):
    """One message in IRC's terms, whatever dialect it came in or leaves by."""

    command: str
    params: tuple[str, ...] = ()
    source: str = ""  # nick!user@host, or a server's name
    tags: Mapping[str, str] = NO_TAGS

    def param(self, index: int) -> str:
        """A parameter, or '' where there is none."""
        return self.params[index] if len(self.params) > index else ""

    @property
    def text(self) -> str:
        """The last parameter, or ''."""
        return self.params[-1] if self.params else ""

    @property
    def nick(self) -> str:
        """Who it is from."""
        return self.source.partition("!")[0]

    @property
    def action(self) -> str | None:
        """What follows /me, or None where it is no action (CTCP ACTION)."""
        text = self.text
        return text[8:].rstrip("\x01") if text.startswith("\x01ACTION ") else None


NO_MESSAGE = Message("")  # of a call that no command began


class Lines(NamedTuple):
    """Messages that differ in their last parameter only, as the 353 of a large channel do: encoded in one step."""

    message: Message  # without it
    texts: tuple[str, ...]

    def messages(self) -> list[Message]:
        """Each of them."""
        return [self.message._replace(params=(*self.message.params, text)) for text in self.texts]


def action(text: str) -> str:
    """Text that clients show as something the sender does."""
    return f"\x01ACTION {text}\x01"


class Line(NamedTuple):
    """A line of a message of several (IRCv3 draft/multiline)."""

    text: str
    goes_on: bool = False  # in what is one line to the reader, but too long for one of IRC


def join_lines(message: Message, lines: Sequence[Line]) -> Message:
    """A PRIVMSG or NOTICE, without its text, that has several lines.

    No text has a line break in it, which somebody would take for the end of the message, and the rest for another one:
    the text is all of them in one line, and a tag has the length of each, after a + where it goes on the one before.
    """
    text = "".join(line.text if line.goes_on or not at else f" {line.text}" for at, line in enumerate(lines))
    sizes = ",".join(f"{'+' * line.goes_on}{len(line.text)}" for line in lines)
    return message._replace(params=(message.param(0), text), tags={**message.tags, LINES_TAG: sizes})


def split_lines(message: Message) -> list[Line]:
    """The lines of which join_lines has made a message; the only one of another."""
    found: list[Line] = []
    start = 0
    for sign, size in re.findall("([+]?)([0-9]{1,5})", message.tags.get(LINES_TAG, "")):
        start += found != [] and not sign
        found.append(Line(message.text[start : start + int(size)], sign != ""))
        start += int(size)
    return found or [Line(message.text)]


def whole_text(message: Message) -> str:
    """The text of a message with its line breaks."""
    if LINES_TAG not in message.tags:
        return message.text
    return "".join(line.text if line.goes_on else f"\n{line.text}" for line in split_lines(message))[1:]


def each_line(message: Message) -> list[Message]:
    """A message for those who know none of several lines: those that are not blank, of which the first has its id, and
    alone has its client's tags where these are long."""
    if LINES_TAG not in message.tags:
        return [message]
    tags = {tag: value for tag, value in message.tags.items() if tag != LINES_TAG}
    found = [message._replace(params=(message.param(0), line.text)) for line in split_lines(message) if line.text]
    more = {tag: value for tag, value in tags.items() if tag not in ("msgid", "label")}
    if len(format_tags(item for item in more.items() if item[0].startswith("+")).encode()) > REPEATED_TAG_BYTES:
        more = {tag: value for tag, value in more.items() if not tag.startswith("+")}
    return [line._replace(tags=more if at else tags) for at, line in enumerate(found)]


def parse_tags(data: str) -> dict[str, str]:
    """Tags from `a=1;b` (IRCv3 message-tags, "Format")."""
    tags = {}
    for item in data.split(";"):
        key, _, value = item.partition("=")
        if key:
            tags[key] = re.sub(r"\\(.?)", lambda m: TAG_UNESCAPES.get(m[1], m[1]), value)
    return tags


def parse(line: str) -> Message:
    """A message from an IRC line without its end: RFC 1459 section 2.3.1, with tags. Never fails."""
    tags, source = NO_TAGS, ""
    if line.startswith("@"):
        data, _, line = line[1:].partition(" ")
        tags, line = parse_tags(data), line.lstrip(" ")
    if line.startswith(":"):
        source, _, line = line[1:].partition(" ")
    line, colon, trailing = line.partition(" :")
    words = line.split(" ")
    if "" in words:
        words = [word for word in words if word] or [""]
    if colon:
        words.append(trailing)
    return Message(words[0].upper(), tuple(words[1 : MAX_PARAMS + 1]), source, tags)


def format_tags(tags: Iterable[tuple[str, str]]) -> str:
    """`@a=1;b `, or '' for no tags."""
    items = []
    for key, value in tags:
        escaped = "".join(TAG_ESCAPES.get(char, char) for char in value)
        items.append(f"{key}={escaped}" if escaped else key)
    return f"@{';'.join(items)} " if items else ""


def format_line(message: Message) -> str:
    """The IRC line of a message without tags and without its end; the last parameter is a trailing one."""
    source = f":{message.source} " if message.source else ""
    if not message.params:
        return source + message.command
    *middle, last = (message.command, *message.params)
    spoken = len(middle) > 1 or message.command in (
        "NICK",
        "QUIT",
        "ERROR",
    )  # ii finds the first two only after a colon
    colon = ":" if spoken or not last or last[0] == ":" or " " in last else ""
    return f"{source}{' '.join(middle)} {colon}{last}"


def format_tagged(message: Message) -> str:
    """The IRC line of a message with all its tags, without its end."""
    return format_tags(message.tags.items()) + format_line(message)


def check_length(message: Message) -> None:
    """Raises CommandError when a message could not be relayed within an IRC line, with its sender's full prefix."""
    if 4 * sum(map(len, message.params)) + 4 * len(message.source) < LINE_BYTES - 40:
        return  # no character has more than four bytes: the usual message needs no closer look
    if len(format_line(message).encode()) + 2 > LINE_BYTES:
        raise CommandError(ERR_INPUTTOOLONG)


def cut(text: str, size: int) -> str:
    """The longest beginning of `text` that has at most `size` bytes in UTF-8."""
    return text if len(text) * 4 <= size else text.encode()[:size].decode(errors="ignore")


def split_text(text: str, size: int, keep: bool = False) -> list[str]:
    """`text` in pieces of at most `size` bytes, between words where that is possible; `keep`: with all blanks."""
    pieces, start = [], 0
    while start < len(text):
        piece = cut(text[start : start + size], size) or text[start]
        end = start + len(piece)
        if text[end : end + 1] not in ("", " ") and " " in piece[1:]:
            end = start + piece.rindex(" ") + keep
        pieces.append(text[start:end])
        start = end
        while text[start : start + 1] == " " and not keep:
            start += 1
    return pieces


class LineBuffer:
    """Bytes in, lines out. Holds at most `limit` bytes of an unfinished line.

    A line ends in LF or CRLF; the CR counts. Empty lines are left out. A line over the limit is dropped, and one
    None stands in its place, as soon as the limit is passed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tail = b""
        self._dropping = False  # until the end of a line that was too long

    def feed(self, data: bytes) -> list[bytes | None]:
        """The lines that are complete with `data`."""
        data = self._tail + data
        lines = data.split(b"\n")
        self._tail = lines.pop()
        if self._dropping or len(data) > self.limit:
            return self._bounded(lines)
        return [line for line in [line.rstrip(b"\r") for line in lines] if line]

    def end(self) -> bytes:
        """What came after the last line's end."""
        tail, self._tail = self._tail.rstrip(b"\r"), b""
        return tail

    def _bounded(self, lines: list[bytes]) -> list[bytes | None]:
        if self._dropping and lines:
            del lines[0]
            self._dropping = False
        checked = [line.rstrip(b"\r") if len(line) <= self.limit else None for line in lines]
        if len(self._tail) > self.limit:
            if not self._dropping:
                checked.append(None)
            self._dropping = True
        if self._dropping:
            self._tail = b""
        return [line for line in checked if line != b""]


@functools.lru_cache(maxsize=8)  # messages of one second share it
def _second(moment: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


@functools.lru_cache(maxsize=8)
def _millisecond(moment: int) -> str:
    return f"{_second(moment // 1000)}.{moment % 1000:03d}Z"


def server_time(moment: float) -> str:
    """A Unix time in seconds as IRCv3 server-time writes it: 2026-01-31T12:00:00.000Z."""
    return _millisecond(int(moment * 1000))


# -----------------------------------------------------------------------------
# text form
# -----------------------------------------------------------------------------

# What a plain user is asked for; other dialects do not show it.
PROMPT = Message("PROMPT", ("Enter your name: ",))
PROMPT_END = Message("PROMPT", ("",))  # what follows is on a line of its own: a person's Enter does that by itself
PASSWORD_PROMPT = Message("PROMPT", ("Enter the password: ",))
# How events read: their name in JSON, and a text of {nick}, {text} (the last parameter), {rest} (all parameters after
# the channel), {here} and {reason}.
EVENT_FORMS = {
    "JOIN": ("join", "{nick} joined{here}"),
    "PART": ("leave", "{nick} left{reason}"),
    "QUIT": ("leave", "{nick} left{reason}"),
    "KICK": ("kick", "{1} was kicked out by {nick}{reason}"),
    "INVITE": ("invite", "{nick} invited {0} to {1}"),
    "MODE": ("mode", "{nick} set {rest}"),
    "NICK": ("nick", "{nick} is now {text}"),
    "TOPIC": ("topic", "{nick} set the topic: {text}"),
    "REDACT": ("redact", "{nick} removed a message{of}{reason}"),
    "NOTICE": ("notice", "{text}"),  # from a server
    "ERROR": ("closing", "{text}"),
    "FAIL": ("fail", "Error: {text}"),
    "WARN": ("warn", "Warning: {text}"),
    "NOTE": ("note", "{text}"),
}
OWN_REASON = "Quit:"  # before what a leaver says, on IRC; what the server says of a leave never begins so
CONNECTION_CLOSED = "Connection closed"  # what it says of one without a word; people need not see it
RESUMED_ELSEWHERE = "You have come back on another connection"
UNSAFE_CATEGORIES = (
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
)  # Unicode categories: controls, formats (direction, zero width), separators
MAX_COMBINING = 8  # combining marks that one letter may carry: real writing needs 4, and more of them cover other lines
TAB = "    "  # how it is shown
MAX_BLANKS = 20  # in a row, as in code with five levels; with more of them a text could pass for the next line
BLANK = "[ \xa0\u1680\u2000-\u200a\u202f\u205f\u2800\u3000]"
TOO_MANY_SPACES = " " * (MAX_BLANKS + 1)
TOO_BLANK = re.compile(f"{BLANK}{{{MAX_BLANKS + 1},}}")
CURSIVE = "[\u0620-\u077f\u07ca-\u07f5\u0840-\u08ff\u1820-\u18aa\U00010d00-\U00010d23\U0001e900-\U0001e943]"
EMOJI = (
    "[\xa9\xae\u203c\u2049\u2122\u2139\u2190-\u21ff\u2300-\u23ff\u2460-\u27bf\u2900-\u297f\u2b00-\u2bff"
    "\u3030\u303d\u3297\u3299\U0001f000-\U0001faff]"
)
VIRAMA = 9  # canonical combining class
# Characters that show nothing, where they are needed to write: ZWNJ between two letters of a script that joins them
# (RFC 5892, A.1; Python does not know which letters of it join); and emoji (UTS 51, ED-9a to ED-17a): joined ones,
# variation selectors, keycaps, flags by tags.
LEGITIMATE = re.compile(
    f"\u200c(?<={CURSIVE}\u200c)(?={CURSIVE})|\u200d(?<=(?:{EMOJI}|\ufe0f)\u200d)(?={EMOJI})"
    f"|[\ufe0e\ufe0f](?<={EMOJI}.)|\ufe0f(?<=[#*0-9]\ufe0f)(?=\u20e3)"
    "|\U0001f3f4[\U000e0030-\U000e007a]{3,6}\U000e007f"
)


def escape_controls(text: str) -> str:
    """`text` with all that a terminal could obey, that hides or pads, made visible: \\x1b, <U+202E>, <80 blanks>.

    Never fails. What is padded with letters still passes for a new line where the terminal breaks lines, as at nc.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(escape_chars(text.replace("\t", TAB)))
    elif TOO_MANY_SPACES not in text:
        return text
    return TOO_BLANK.sub(lambda blanks: f"<{len(blanks[0])} blanks>", text)


def escape_chars(text: str) -> list[str]:
    """How each character of `text` is shown.

    A joiner passes beside a virama, too: RFC 5892, A.1 and A.2, wants it before, Bengali has it also after the joiner.
    """
    legitimate = {at for match in LEGITIMATE.finditer(text) for at in range(*match.span())}
    shown, marks = [], 0
    for at, char in enumerate(text):
        joins = at in legitimate or (
            char in "\u200c\u200d" and VIRAMA in map(unicodedata.combining, text[max(at - 1, 0) : at + 2])
        )
        marks = marks + 1 if joins or unicodedata.category(char)[0] == "M" else 0
        escaped = marks > MAX_COMBINING or (not joins and is_unsafe(char))
        shown.append(char if not escaped else f"\\x{ord(char):02x}" if char < "\u0100" else f"<U+{ord(char):04X}>")
    return shown


@functools.lru_cache(maxsize=4096)
def is_unsafe(char: str) -> bool:
    """Whether a terminal could obey a character, or shows nothing of it."""
    return unicodedata.category(char) in UNSAFE_CATEGORIES or bool(INVISIBLE.match(char))


def plural(number: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 line, 2 lines."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def safe_param(text: str) -> str:
    """`text` as a parameter that is not the last: one word, not empty, short."""
    return cut(escape_controls(text).lstrip(" :").partition(" ")[0], NICK_BYTES) or "*"


def is_system(message: Message) -> bool:
    """Whether a message is an event of the chat rather than something that a user says."""
    return message.command != "PRIVMSG" and (message.command != "NOTICE" or "!" not in message.source)


def event_of(message: Message) -> tuple[str, str]:
    """(name, readable text without stars) of a system message; the text is '' where a person need not see it."""
    numeric = NUMERICS.get(message.command)
    if re.fullmatch("[45][0-9][0-9]", message.command):
        return numeric.name if numeric else "error", "Error: " + escape_controls(message.text)
    name, form = (numeric.name, numeric.form) if numeric else EVENT_FORMS.get(message.command, ("", ""))
    values = [escape_controls(param) for param in message.params] + [""] * MAX_PARAMS
    author = message.tags.get(AUTHOR_TAG, message.nick)
    return name, form.format(
        *values,
        nick=escape_controls(message.nick),
        text=escape_controls(message.text),
        rest=escape_controls(" ".join(message.params[2 if numeric else 1 :])),
        here=f" ({escape_controls(message.tags[COUNT_TAG])} here)" if COUNT_TAG in message.tags else "",
        of=f" of {escape_controls(author)}" if author != message.nick else "",
        reason=escape_controls(reason_form(message)),
    )


def reason_form(message: Message) -> str:
    """How the reason of a PART, KICK or the like reads, '' for none: after a colon in a user's words, in brackets in
    the server's, so that neither can pass for the other."""
    reason = message.param({"QUIT": 0, "KICK": 2, "REDACT": 2}.get(message.command, 1))
    if message.command == "QUIT":
        if not reason.startswith(OWN_REASON):
            return f" ({reason})" if reason not in ("", CONNECTION_CLOSED) else ""
        reason = reason[len(OWN_REASON) :].strip()
    elif message.command == "KICK" and reason == message.nick:  # RFC 2812, section 3.2.8: there was none
        return ""
    return f": {reason}" if reason else ""


def text_form(message: Message, name: Callable[[str], str] = escape_controls, elsewhere: bool = False) -> str:
    """The line in which a person reads a message, '' for none. What the network sent is escaped.

    `name` makes the sender's name so, and may colour it. `elsewhere`: the channel is named, as it is not the reader's;
    so are those of a rank in it (@#chat), as nobody else got that.
    """
    place = f"[{escape_controls(message.param(0))}] " if elsewhere or message.param(0)[:2] in ("@#", "+#") else ""
    if is_system(message):
        text = event_of(message)[1]
        return text and f"*** {place}{text}"
    if not is_channel(message.param(0)):
        place = "[private] "
    doing = message.action
    if doing is not None:
        return f"{place}* {name(message.nick)} {escape_controls(doing)}"
    return f"{place}{name(message.nick)}: {escape_controls(message.text)}"


class SlashCommand(NamedTuple):
    """A slash command: its grammar, what /help says, and its message from the channel and the words after it."""

    grammar: str
    help: str
    least: int
    words: int  # the last word takes the rest of the line
    message: Callable[[str, tuple[str, ...]], Message]
    local: bool = False  # done by the bundled client itself, so unknown to the plain dialect
    more: tuple[str, ...] = ()  # lines that /help COMMAND adds


MODE_HELP = (
    "+o NAME: may moderate; +v NAME: may speak in spite of +m; - takes each away again",
    "+b MASK: may not come or speak, as bob, or *!*@HOST as /whois shows it; +b alone lists them",
    "+i: only who is invited comes; +k KEY: only who knows it; +l NUMBER: no more than so many",
    "+e MASK: never banned; +I MASK: needs no invitation; each alone lists them",
    "+m: only +o and +v speak; +n: only who is here; +t: only +o sets the topic",
    "+s: hidden from who is not here; +C: no CTCP but /me",
)


SLASH_COMMANDS = {
    "help": SlashCommand("[COMMAND]", "shows this, or more", 0, 1, lambda here, words: Message("HELP", words)),
    "nick": SlashCommand("NAME", "takes another name", 1, 2, lambda here, words: Message("NICK", words[:1])),
    "msg": SlashCommand("NAME TEXT", "speaks to one person", 2, 2, lambda here, words: Message("PRIVMSG", words)),
    "reply": SlashCommand(
        "TEXT", "answers the last private message", 1, 1, lambda here, words: Message("REPLY", words), True
    ),
    "me": SlashCommand(
        "TEXT", "says what you do", 1, 1, lambda here, words: Message("PRIVMSG", (here, action(words[0])))
    ),
    "who": SlashCommand(
        "[#NAME]", "shows who is here, or there", 0, 2, lambda here, words: Message("NAMES", words[:1] or (here,))
    ),
    "list": SlashCommand("", "shows the channels", 0, 1, lambda here, words: Message("LIST", words)),
    "whois": SlashCommand("NAME", "tells more about somebody", 1, 2, lambda here, words: Message("WHOIS", words[:1])),
    "join": SlashCommand(
        "#NAME [KEY]", "speaks in another channel", 1, 3, lambda here, words: Message("JOIN", words[:2])
    ),
    "part": SlashCommand(
        "[#NAME]", "leaves a channel", 0, 2, lambda here, words: Message("PART", words[:1] or (here,))
    ),
    "topic": SlashCommand(
        "[TEXT]", "shows or sets the topic", 0, 1, lambda here, words: Message("TOPIC", (here, *words))
    ),
    "invite": SlashCommand(
        "NAME", "asks somebody to come", 1, 2, lambda here, words: Message("INVITE", (words[0], here))
    ),
    "redact": SlashCommand(
        "[ID [TEXT]]", "removes your last line", 0, 2, lambda here, words: Message("REDACT", (here, *(words or "*")))
    ),
    "kick": SlashCommand("NAME [TEXT]", "puts somebody out", 1, 2, lambda here, words: Message("KICK", (here, *words))),
    "mode": SlashCommand(
        "[MODES]",
        "shows or sets modes: +o NAME",
        0,
        9,
        lambda here, words: Message("MODE", (here, *words)),
        more=MODE_HELP,
    ),
    "away": SlashCommand("[TEXT]", "says why you do not answer", 0, 1, lambda here, words: Message("AWAY", words)),
    "ignore": SlashCommand(
        "[NAME]", "hides somebody, or no more", 0, 2, lambda here, words: Message("IGNORE", words[:1]), True
    ),
    "clear": SlashCommand("", "clears the screen", 0, 1, lambda here, words: Message("CLEAR"), True),
    "quit": SlashCommand("[TEXT]", "leaves, as does exit alone", 0, 1, lambda here, words: Message("QUIT", words)),
}
ALIASES = {"names": "who", "exit": "quit", "leave": "part"}


def parse_input(line: str, here: str, local: bool = False) -> Message:
    """The message that a line typed in channel `here` stands for; raises CommandError for a wrong command."""
    if line.strip() == "exit":
        return Message("QUIT")
    if not line.startswith("/") or line.startswith("//"):
        return Message("PRIVMSG", (here, line[1:] if line.startswith("/") else line))
    name, _, rest = line[1:].partition(" ")
    slash = SLASH_COMMANDS.get(ALIASES.get(name.lower(), name.lower()))
    if slash is None or (slash.local and not local):
        raise CommandError(
            FAIL_BAD_SLASH, f"/{name} is not a command; /help lists them (//text sends a line with a slash)"
        )
    words = tuple(rest.split(None, slash.words - 1)) if rest.strip() else ()
    if len(words) < slash.least:
        raise CommandError(FAIL_BAD_SLASH, f"it is /{name} {slash.grammar}")
    return slash.message(here, words)


def help_lines(asked: str, local: bool = False) -> list[str]:
    """What /help says, a line each: of all commands, or of the one that was asked for."""
    wanted = asked.lstrip("/").lower()
    wanted = ALIASES.get(wanted, wanted)
    shown = {name: slash for name, slash in SLASH_COMMANDS.items() if local or not slash.local}
    if wanted and wanted not in shown:
        return [f"{safe_param(asked)} is not a command; /help lists them"]
    lines = [f"{f'/{name} {slash.grammar}':18}{slash.help}" for name, slash in shown.items() if wanted in ("", name)]
    return [*lines, *(shown[wanted].more if wanted else ())]


# -----------------------------------------------------------------------------
# web
# -----------------------------------------------------------------------------
# HTTP (RFC 9110, RFC 9112), with one request on each connection; the frames of WebSocket (RFC 6455).

HTTP_FIRST = re.compile(rb"[!-z|~]+ .*HTTP/\d")  # a page may choose any method
REQUEST_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (?:[Hh][Tt][Tt][Pp][Ss]?://([^/? ]*)(?![^/? ]))?([!-~]*) HTTP/(\d)\.(\d)"
)
FIELD_LINE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0-\x08\n-\x1f\x7f]*")
HOST = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?", re.ASCII)
LOCAL_NAMES = (".local", ".localhost", ".lan", ".internal", ".home.arpa")  # which no stranger's DNS can give an address
HTTP_HEADERS = (
    "Connection: close\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nX-Frame-Options: DENY\r\n"
    "Referrer-Policy: no-referrer\r\nCross-Origin-Resource-Policy: same-origin\r\n"
)
WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # section 1.3
SUBPROTOCOLS = ("text.ircv3.net", "binary.ircv3.net")  # IRCv3 websocket
# Section 5.2: opcodes; those from 8 on are of control frames.
WS_MORE, WS_TEXT, WS_BINARY, WS_CLOSE, WS_PING, WS_PONG = 0, 1, 2, 8, 9, 10
# Section 7.4: of our ends, by what is said last.
CLOSE_CODES = {"Goodbye": 1000, "Server is shutting down": 1001, "Ping timeout": 1001, RESUMED_ELSEWHERE: 4001}
POLICY_VIOLATION = 1008  # all others


class HttpError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, text: str = "", **headers: str) -> None:
        super().__init__(status, text)
        self.status, self.text = status, text
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, str]
    minor: int  # of its version 1.x
    host: str  # with the port; '' for none, which 1.0 allows
    headers: Any  # email.message.Message

    def items(self, name: str) -> list[str]:
        """What a header lists, in lower case."""
        return [item.strip().lower() for value in self.headers.get_all(name, ()) for item in value.split(",")]

    def password(self) -> str:
        """The one of Authorization, by Bearer or Basic; raises HttpError."""
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        try:
            data = value.strip().encode("latin-1")
            return (binascii.a2b_base64(data).partition(b":")[2] if scheme.lower() == "basic" else data).decode()
        except ValueError:
            raise HttpError(400) from None

    def check_host(self, secured: bool, origins: Collection[str]) -> None:
        """Refuses what a page of somebody else has sent: of another origin, or, if that is not `secured` by TLS, by a
        name that may lead elsewhere tomorrow (DNS rebinding). Raises HttpError."""
        host, origin = self.host.lower(), self.headers.get("Origin")
        name = re.sub(r"\.?(:\d*)?$", "", host)
        known = name.endswith(LOCAL_NAMES) or re.fullmatch(r"[^.]*|[\d.]+|\[.*\]", name)
        if not secured and not known and name not in [re.sub(r".*://|:\d*$", "", origin) for origin in origins]:
            raise HttpError(421, f"For this name, the server has to be started with --web-origin https://{name}")
        if origin is not None and origin.lower() not in origins and origin.lower().partition("://")[2] != host:
            raise HttpError(403, "This is not a page of this server; see --web-origin")

    def subprotocol(self) -> str:
        """The one of WebSocket that we take."""
        return next((item for item in self.items("Sec-WebSocket-Protocol") if item in SUBPROTOCOLS), "")

    def handshake(self) -> bytes:
        """The answer that goes on with WebSocket: RFC 6455, section 4.2. Raises HttpError."""
        key = self.headers.get("Sec-WebSocket-Key", "").strip()
        asks = self.method == "GET" and self.minor and "upgrade" in self.items("Connection")
        if not asks or not re.fullmatch("[A-Za-z0-9+/]{22}==", key):
            raise HttpError(400)
        if self.headers.get("Sec-WebSocket-Version", "").strip() != "13":
            raise HttpError(426, Sec_WebSocket_Version="13")
        accept = binascii.b2a_base64(hashlib.sha1((key + WEBSOCKET_GUID).encode()).digest()).decode().strip()
        protocol = f"Sec-WebSocket-Protocol: {self.subprotocol()}\r\n" if self.subprotocol() else ""
        return (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n{protocol}\r\n"
        ).encode()

    def body_length(self) -> int:
        """How long its body is; raises HttpError."""
        lengths = self.headers.get_all("Content-Length", [])
        encoded = "Transfer-Encoding" in self.headers
        if len(lengths) + encoded > 1 or not all(re.fullmatch("[0-9]{1,15}", length.strip()) for length in lengths):
            raise HttpError(400)
        if self.method != "POST":
            return 0
        if not lengths:
            raise HttpError(411)
        if int(lengths[0]) > HTTP_BYTES:
            raise HttpError(413, f"at most {HTTP_BYTES} bytes at once")
        return int(lengths[0])


def parse_request(head: bytes) -> Request:
    """A request from its head, without the empty line; raises HttpError."""
    import email.parser

    first, *fields = [line[: len(line) - line.endswith("\r")] for line in head.decode("latin-1").split("\n")]
    match = REQUEST_LINE.fullmatch(first)
    if not match or not all(map(FIELD_LINE.fullmatch, fields)):
        raise HttpError(400)
    method, named, target, major, minor = match.groups()
    if major != "1":
        raise HttpError(505)
    headers = email.parser.HeaderParser().parsestr("\n".join(fields))
    hosts = [host.strip() for host in headers.get_all("Host", [])]
    host = named if named is not None else "".join(hosts)
    if len(hosts) > 1 or (hosts or minor != "0" or named) and not HOST.fullmatch(host):
        raise HttpError(400)
    path, _, query = target.partition("?")
    if not path.startswith("/") and named is None:
        raise HttpError(400)
    try:
        return Request(method, path or "/", dict(urllib.parse.parse_qsl(query)), int(minor), host, headers)
    except ValueError:  # too many parameters
        raise HttpError(400) from None


def http_answer(status: int, body: bytes | str = "", kind: str = "text/plain", **headers: str) -> bytes:
    """An answer; a body in text ends its last line, and without one the status is said."""
    import email.utils

    phrase = http.HTTPStatus(status).phrase
    data = body if isinstance(body, bytes) else f"{body or phrase}\n".encode()
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return (
        f"HTTP/1.1 {status} {phrase}\r\nDate: {email.utils.formatdate(usegmt=True)}\r\n{HTTP_HEADERS}{more}"
        f"Content-Type: {kind}; charset=utf-8\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode("latin-1") + data


def frame(opcode: int, data: bytes) -> bytes:
    """A whole message, or a control frame, as a server sends it: not masked (section 5.1)."""
    size = len(data)
    if size < 126:
        return bytes((0x80 | opcode, size)) + data
    if size < 1 << 16:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + data
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + data


def close_frame(code: int, reason: str) -> bytes:
    return frame(WS_CLOSE, code.to_bytes(2, "big") + cut(reason, 123).encode())


@functools.lru_cache(maxsize=None)
def page_policy() -> str:
    """What the page may do, as a Content-Security-Policy with a place for the host: nothing but run its own parts."""
    found = []
    for tag in ("script", "style"):
        part = re.search(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        assert part
        found.append(binascii.b2a_base64(hashlib.sha256(part[1].encode()).digest(), newline=False).decode())
    return (
        f"default-src 'none'; script-src 'sha256-{found[0]}'; style-src 'sha256-{found[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "connect-src 'self' ws://{0} wss://{0}"  # older Safari does not count ws as 'self'
    )


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, interactive-widget=resizes-content">
<title>chat</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath
 fill='%232f6fde' d='M3 1h10a2 2 0 0 1 2 2v6a2 2 0 0 1-2 2H8l-4 4v-4H3a2 2 0 0 1-2-2V3a2 2 0 0 1 2-2z'/%3E%3C/svg%3E">
<style>
:root { color-scheme: light dark; --ground: #fff; --side: #f6f7f9; --edge: #e1e4e9; --ink: #1c2027; --past: #434955;
  --dim: #626a77; --accent: #1f5fd0; --on-accent: #fff; --error: #b3261e; --private: #8a2f9c; --mark: #fff3d1;
  --l: 0.5 }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --side: #1c1f24; --edge: #31353d; --ink: #e6e8ec;
  --past: #bcc2cc; --dim: #98a0ad; --accent: #84b3ff; --on-accent: #0d1b33; --error: #ff8f85; --private: #e29bf0;
  --mark: #352e1a; --l: 0.8 } }
* { box-sizing: border-box; margin: 0; padding: 0; font: inherit; color: inherit; scrollbar-width: thin }
[hidden] { display: none !important }
body { height: 100dvh; background: var(--ground); color: var(--ink); overflow: hidden;
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
input, textarea, button { border: 1px solid var(--edge); border-radius: 10px; padding: 9px 12px; background: none }
button { padding: 6px 12px; cursor: pointer } button:hover { border-color: var(--dim) }
button.main { border-color: transparent; background: var(--accent); color: var(--on-accent); font-weight: 600 }
::placeholder { color: var(--dim); opacity: 1 }
:focus-visible { outline: 2px solid var(--accent); outline-offset: -1px }
h1 { font-size: 17px; font-weight: 650; white-space: nowrap }
#entry { display: grid; align-content: start; gap: 16px; height: 100%; overflow-y: auto;
  padding: 12vh max(20px, 50% - 170px) 20px }
#entry h1 { font-size: 28px } #entry label { display: grid; gap: 4px; font-weight: 600 }
#entry input { font-weight: 400 } #entry button { padding: 10px } #refusal { color: var(--error) }
#refusal:empty { display: none } #refusal::first-letter { text-transform: uppercase }
#room { display: flex; flex-direction: column; height: 100% }
header, .bar { display: flex; align-items: center; gap: 8px; padding: 9px 12px 9px 20px; border: 0 solid var(--edge) }
header { border-bottom-width: 1px; min-height: 54px } header button { flex: none; border-color: transparent }
header button, #topic { color: var(--dim); font-size: 15px } .bar span, #topic { flex: 1; min-width: 0 }
#topic { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; padding-left: 6px }
.bar { border-top-width: 1px; background: var(--side); font-size: 15px }
main { position: relative; flex: 1; display: flex; min-height: 0 }
#log { flex: 1; overflow-y: auto; overflow-anchor: none; overscroll-behavior: contain; padding: 8px 0 14px }
.line { position: relative; padding: 1px 20px 1px 17px; border-left: 3px solid transparent; overflow: clip }
.line > * { max-width: 820px }
.line::before { display: block; margin: 18px 0 10px; color: var(--dim); font-size: 13px; font-weight: 600 }
.line[data-day]::before { content: attr(data-day) } .line.new::before { content: "New"; color: var(--error) }
.line.new[data-day]::before { content: attr(data-day) " · New" } .first { margin-top: 12px } .action { margin-top: 5px }
.head:not(.first > *) { position: absolute; clip-path: inset(50%); width: 1px; height: 1px }
.name { color: oklch(var(--l) 0.14 var(--hue)); font-weight: 650; unicode-bidi: isolate }
time { margin-left: 8px; color: var(--dim); font-size: 12.5px; font-variant-numeric: tabular-nums }
.text { display: block; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext }
.action .text, .system .text { display: inline } .action .text { font-style: italic }
.text.removed { color: var(--dim); font-style: italic }
.past .text { color: var(--past) } .system .text, .pending .text { color: var(--dim) }
.system { padding-top: 2px; padding-bottom: 2px; font-size: 14.5px } .error .text { color: var(--error) }
.help .text { font: 13.5px/1.3 ui-monospace, monospace } .help time { display: none }
.line a { color: var(--accent); text-underline-offset: 2px }
.private { border-left-color: var(--private) } .tag { margin-left: 8px; color: var(--private); font-size: 13.5px }
.mention { border-left-color: #e0a100; background: var(--mark) } mark { background: none; font-weight: 650 }
#newer { position: absolute; left: 50%; bottom: 12px; transform: translateX(-50%); border-radius: 99px }
#people { width: 220px; overflow-y: auto; padding: 14px 12px; background: var(--side);
  border-left: 1px solid var(--edge) }
#people h2 { padding: 0 8px 6px; color: var(--dim); font-size: 13px; font-weight: 600 }
#people li { display: flex; align-items: baseline; gap: 4px; color: var(--dim); font-size: 13px }
#people button { min-width: 0; padding: 4px 8px; border: 0; overflow: hidden; text-overflow: ellipsis; font-size: 15px }
#composer { display: flex; align-items: flex-end; gap: 8px; border-top: 1px solid var(--edge);
  padding: 10px 12px max(10px, env(safe-area-inset-bottom)) }
#draft { flex: 1; min-width: 0; min-height: 44px; max-height: 30vh; resize: none } #composer button { height: 44px }
@media (max-width: 699px) { header, .bar, .line { padding-left: 13px; padding-right: 13px }
  #people { position: absolute; inset: 0 0 0 auto; width: min(260px, 80%); box-shadow: -8px 0 24px #0003 } }
</style>
<form id="entry" hidden><h1>chat</h1><p>Choose a name, and talk to everybody in <b id="place"></b>.</p>
  <label>Name <input id="name" autocomplete="nickname" autocapitalize="none" spellcheck="false" maxlength="24" required>
  </label>
  <label id="secret" hidden>Password <input id="password" type="password" autocomplete="current-password"></label>
  <p id="refusal" role="alert"></p><button class="main">Join</button></form>
<div id="room" hidden>
  <header><h1 id="channel"></h1><p id="topic"></p>
    <button id="notify" hidden>Notify me</button><button id="toggle" aria-controls="people"></button></header>
  <main><div id="log" role="log" aria-live="polite" aria-label="Messages" tabindex="0"></div>
    <button id="newer" class="main" hidden></button>
    <aside id="people" aria-label="People here" hidden><h2>People here</h2><ul id="list" role="list"></ul></aside>
  </main>
  <div id="status" class="bar" role="status" hidden><span id="what"></span><button id="act"></button></div>
  <form id="composer"><textarea id="draft" rows="1" aria-label="Message" enterkeyhint="send"></textarea>
    <button class="main">Send</button></form>
</div>
<script>
"use strict";
const LINES = 1000, MOST_LINES = 10000, PAGE = 100, PEOPLE = 500;  // kept at the bottom, at most; fetched; listed
const DRAW_MS = 20, GROUP_MS = 300e3, NEAR_PX = 30, SILENCE_MS = 40e3, PATIENCE_MS = 8e3;
const BLOCK_LINES = 32, BLOCK_BYTES = 4096;  // of one message, at most
const HUES = [145, 90, 260, 325, 200, 25, 125, 240, 300, 180];  // of names, as at a terminal
const COMMANDS = "away clear help invite join kick me mode msg nick quit redact reply topic who whois".split(" ");
const HELP = ["/reply TEXT       answers the last private message", "/clear            clears the page"];  // more of it
const STAY = { 1000: ["You have left.", "Come back"], 1008: ["", "Try again"],  // codes after which we wait to be asked
  4001: ["You are here in another tab or window.", "Use this one"] };
const clock = new Intl.DateTimeFormat([], { timeStyle: "short" });
const dates = new Intl.DateTimeFormat([], { dateStyle: "full" }), wide = matchMedia("(min-width: 700px)");
const $ = (id) => document.getElementById(id), log = $("log"), draft = $("draft");
const encoder = new TextEncoder(), life = hex(4), people = new Map();  // by folded name; who was heard last is last
const state = {
  name: load("name") || "", token: load("token") || hex(16), password: load("password") || "", key: "", partner: "",
  channel: "", wanted: asked(), topic: "", listing: false, toggled: false,
  socket: null, joined: false, asking: false, chosen: false, tries: 0, retry: 0, patience: 0, heard: 0, notice: "",
  pending: load("pending") || [], replies: new Map(), pongs: [], count: 0,  // what is not answered yet
  rows: new Map(), queue: [], gone: [], timer: 0, stuck: true, scrolled: 0, below: 0, unread: 0, fresh: null,
  newest: "", synced: "", seen: load("seen") || "", caught: false, older: false, fetching: "", fetched: 0,  // by ids
  typed: [], at: 0, unsent: "", pasted: false, tab: null, stale: true };
const set = (values) => Object.assign(state, values), later = (one, other) => (one > other ? one : other);
const fold = (name) => name.normalize("NFKC").toLowerCase(), isMe = (name) => fold(name) === fold(state.name);
const bytes = (text) => encoder.encode(text).length, keyOf = (id) => id.padStart(16, "0");
const isOpen = () => state.socket?.readyState === WebSocket.OPEN;
const attentive = () => !document.hidden && document.hasFocus() && state.stuck, ref = () => `${life}-${state.count++}`;
function storage(key) { return ["name", "token", "seen"].includes(key) ? localStorage : sessionStorage; }
function load(key) { try { return JSON.parse(storage(key).getItem(key)); } catch { return null; } }
function save(key, value) { try { storage(key).setItem(key, JSON.stringify(value)); } catch { /* forbidden */ } }
function asked() {  // the channel that the address names
  try { return decodeURIComponent(location.hash) || "#chat"; } catch { return "#chat"; }
}
function hex(size) {
  return [...crypto.getRandomValues(new Uint8Array(size))].map((byte) => (byte + 256).toString(16).slice(1)).join("");
}
function safe(text) {  // what would be obeyed, or shows nothing, made visible
  const unsafe = /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}]|(?![\u200c\u200d\u{e0020}-\u{e007f}])\p{Cf}/gu;
  const code = (char) => `<U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`;
  return text.replaceAll("\t", "    ").replace(unsafe, code);
}
function hue(name) {  // by CRC-32
  const shift = (sum) => (sum >>> 1) ^ (sum & 1 && 0xedb88320);
  const sum = encoder.encode(fold(name)).reduce((sum, byte) => [..."12345678"].reduce(shift, sum ^ byte), ~0);
  return HUES[(~sum >>> 0) % HUES.length];
}
function split(text, size) {  // into pieces of at most so many bytes, between words where that is possible
  if (bytes(text) <= size) return text ? [text] : [];
  let end = size;
  while (bytes(text.slice(0, end)) > size || /[\ud800-\udbff]$/.test(text.slice(0, end))) end--;
  if (text.lastIndexOf(" ", end) > 0) end = text.lastIndexOf(" ", end);
  return [text.slice(0, end), ...split(text.slice(end).replace(/^ +/, ""), size)];
}
function roomFor(to, action) {  // bytes of a line, of the 512 that others get; a name may be too long
  return Math.max(450 - bytes(state.name + (to || state.channel)) - (action ? 10 : 0), 100);
}
function isBlock(text) {  // whether it can be one message of several lines
  const lines = text.split("\n"), fits = lines.every((line) => bytes(line) <= roomFor(""));
  return lines.length > 1 && lines.length <= BLOCK_LINES && fits && bytes(JSON.stringify(text)) <= BLOCK_BYTES;
}
function element(tag, look, content, values) {
  const made = Object.assign(document.createElement(tag), { className: look, ...values });
  made.append(...content);
  return made;
}
function named(tag, user, values) {
  const made = element(tag, "name", [safe(user)], values);
  made.style.setProperty("--hue", hue(user));
  return made;
}

// The connection.
function leave() {
  if (state.socket) Object.assign(state.socket, { onopen: null, onmessage: null, onclose: null }).close();
}
function connect() {
  leave();
  clearTimeout(state.retry);
  const socket = new WebSocket(new URL(".", location).href.replace(/^http/, "ws"));
  Object.assign(socket, { onopen: enter, onmessage: receive, onclose: lost });
  set({ socket, retry: 0, notice: "", pongs: [], patience: Date.now() + PATIENCE_MS });
}
function send(item) { state.socket.send(JSON.stringify(item)); }
function enter() {
  const { name: user, wanted: channel, key, password, token } = state;
  send({ type: "join", user, channel, token, replay: false, ...(key && { key }), ...(password && { password }) });
}
function receive({ data }) {
  const item = JSON.parse(data);
  set({ patience: 0, heard: Date.now() });
  ON[item.type]?.(item);
  drawSoon();
}
function lost({ code, reason }) {
  const [text, action] = STAY[code] || [], pause = Math.min(30e3, 500 * 2 ** state.tries) * (0.5 + Math.random() / 2);
  leave();
  set({ socket: null, joined: false, patience: 0, fetching: "", replies: new Map() });
  if (action) set({ notice: text || reason, action });
  else if (!state.asking) set({ tries: state.tries + 1, retry: setTimeout(connect, pause) });
  drawSoon();
}
function check() {  // whether the server still answers: nobody tells us when a network is gone
  if (state.patience || !isOpen()) return;
  send({ type: "ping" });
  set({ pongs: [...state.pongs, null], patience: Date.now() + PATIENCE_MS });
}
function wake() { if (state.retry) connect(); else check(); }
function tick() {
  if (state.patience && Date.now() > state.patience) lost({});
  else if (Date.now() > state.heard + SILENCE_MS) check();
}

// What arrives.
const ON = {
  chat: said, private: said, pong: () => state.pongs.shift()?.(),
  ack: (item) => answered(item, (line) => show({ ...line, ...item, type: line.type, pending: false })),
  error(item) {
    const { code, text } = item, again = !state.joined && ["wrong-password", "bad-name", "name-taken"].includes(code);
    if (again && (state.chosen || code !== "name-taken")) ask(text, code === "wrong-password");
    else if (again) enter(setName(state.name.replace(/\d*$/, (number) => (Number(number) || 1) + 1)));
    else if (!answered(item, (line) => note(`Not sent: ${line.text} (${text})`, "error"))) note(text, "error");
  },
  system(item) {
    const text = item.text.replace(/^\*\*\* /, ""), { event, id, time } = item;
    if (EVENTS[event]?.(item, text) !== false) note(text, event === "help" ? "help" : "", { id, time });
    if (event === "help" && text.startsWith("/quit")) HELP.forEach((line) => note(line, "help"));
    state.stale = true; drawSoon();
  } };
const EVENTS = {  // false: is not shown
  join: (item) => (state.joined && !isMe(item.user) ? meet(item.user) : entered(item)),
  leave: ({ user }) => void people.delete(fold(user)),
  kick({ name }, text) {
    people.delete(fold(name));
    if (isMe(name)) set({ joined: false, notice: text, action: "Join again" });
  },
  nick({ user, name }) {
    meet(name, people.get(fold(user)));
    if (fold(user) !== fold(name)) people.delete(fold(user));
    if (isMe(user)) setName(name);
  },
  topic({ user, topic }) { state.topic = topic; return Boolean(user) || !state.listing; },
  names({ users, ranks }) { users.forEach((name, at) => meet(name, { rank: ranks[at] })); return !state.listing; },
  mode: (item, text) => void (/^\S+ set [+-]\w*[ov]/.test(text) && listPeople()),
  away: ({ user }) => (user ? meet(user, { away: true }) && false : true),
  back: ({ user }) => (user ? meet(user, { away: false }) && false : true),
  redact({ id }, text) {  // the line itself says so, where it is shown
    draw();
    const shown = state.rows.get(id)?.querySelector(".text");
    if (shown) Object.assign(shown, { textContent: safe(text), className: "text removed" });
    else note(text);
    return false;
  },
  closing: () => false };
function meet(name, values) { return people.set(fold(name), { rank: "", ...people.get(fold(name)), ...values, name }); }
function entered({ user, channel, id }) {
  const first = !state.joined, known = channel === state.channel;
  set({ joined: true, tries: 0, chosen: false, notice: "", topic: "", caught: false, channel, wanted: channel });
  setName(user); people.clear();
  if (!known) {
    clear();
    const hash = `#${encodeURIComponent(channel.slice(1))}`;
    history.replaceState(null, "", channel === "#chat" ? location.pathname + location.search : hash);
    state.pending.forEach(show);
  }
  listPeople();
  if (first) state.pending.slice().forEach(transmit);
  catchUp(0);
  return Boolean(id) || !known;
}
function listPeople() {
  send({ type: "command", text: "/who" }); send({ type: "ping" });
  set({ listing: true, pongs: [...state.pongs, () => { state.listing = false; }] });
}
function fetchLines(side, since, then) {
  const reply = ref();
  set({ fetching: side, fetched: 0 });
  state.replies.set(reply, () => { state.fetching = ""; then(state.fetched >= PAGE); });
  send({ type: "history", channel: state.channel, ref: reply, ...(since && { [side]: since.replace(/^0+/, "") }) });
}
function catchUp(pages) {  // asks for what was missed; for the last of it where that is much
  const since = state.synced;
  fetchLines("after", since, (more) => {
    if (more && since && pages === LINES / PAGE) clear();
    if (more && since) catchUp(pages + 1);
    else set({ caught: true, synced: state.newest, older: state.older || more });
  });
}
function answered({ ref }, then) {  // whether this answers a pending line, or a question
  const line = state.pending.find((one) => ref && one.ref === ref), reply = state.replies.get(ref);
  state.replies.delete(ref);
  reply?.();
  if (!line) return reply;
  state.gone.push(ref);
  save("pending", (state.pending = state.pending.filter((one) => one !== line)));
  return then(line) || true;
}
function said(item) {
  const { user, id, type, text, replayed } = item, key = keyOf(id), person = people.get(fold(user));
  state.fetched += Boolean(replayed);
  if (replayed ? state.fetching === "after" : state.caught) state.synced = later(state.synced, key);
  show({ ...item, mine: isMe(user) });
  if (isMe(user) || (replayed && (!state.seen || key <= state.seen))) return;
  if (person && people.delete(fold(user))) people.set(fold(user), person);  // for Tab: who was heard last
  if (type === "private") state.partner = user;
  if (attentive()) return;
  state.unread++;
  if (type === "private" || state.mention.test(text)) alertTo(item);
}
function alertTo({ user, channel, text }) {
  try {
    new Notification(`${user} in ${channel || "private"}`, { body: text, tag: "chat" }).onclick = () => window.focus();
  } catch { /* not allowed, or not here */ }
}
function note(text, look = "", stamp = {}) { show({ type: "system", text, look, ...stamp }); }

// What is typed.
function submit() {
  const lines = draft.value.split("\n").filter((line) => line.trim()), many = state.pasted && lines.length > 1;
  const text = draft.value.replace(/^(\s*\n)+|\s+$/g, ""), block = many && isBlock(text);
  const how = block ? " as one message" : ", each as a message";
  if (!lines.length || (many && !confirm(`Send ${lines.length} lines${how}?`))) return;
  state.fresh?.classList.remove("new");
  set({ typed: [...state.typed, draft.value], at: state.typed.length + 1, fresh: null });
  toBottom(); setDraft("");
  (block ? [text] : lines).forEach((line) => (many ? say(line) : obey(line)));
}
function obey(line) {
  const [, name, rest] = line.match(/^\/(\w+)\s*(.*)$/) || [], local = Object.hasOwn(LOCAL, name) && LOCAL[name];
  if (!name) say(line.replace(/^\/\//, "/"));
  else if (local && rest) local(rest, ...rest.split(/\s+/));
  else if (name === "clear") clear();
  else if (state.joined) send({ type: "command", text: line });
  else note("Not connected", "error");
}
const LOCAL = {  // commands with words that we carry out ourselves
  me: (text) => say(text, "", true), msg: (text, to) => say(text.slice(to.length).trim(), to),
  reply: (text) => (state.partner ? say(text, state.partner) : note("Nobody has written to you", "error")),
  join: (text, channel, key) => join(channel, key) };
function join(channel, key = "") {
  set(state.joined ? { key } : { key, wanted: channel });
  if (isOpen()) send({ type: "join", channel, replay: false, ...(key && { key }) });
}
function say(text, to = "", action = false) {
  for (const piece of isBlock(text) ? [text] : split(text, roomFor(to, action))) {
    const line = { type: to ? "private" : "chat", user: state.name, text: piece, to, action, mine: true, pending: true,
      channel: to ? "" : state.channel || state.wanted, ref: ref() };
    state.pending.push(line); show(line);
    if (state.joined) transmit(line);
  }
  save("pending", state.pending);
}
function transmit(line) {
  const { type, text, to, action, channel, ref } = line;
  if (!to && channel !== state.channel) answered(line, () => note(`Not sent in ${channel}: ${text}`, "error"));
  else send(action ? { type: "command", text: `/me ${text}`, ref } : { type, text, ref, ...(to && { to }) });
}
function setName(name) {
  const pattern = `(?<![\\p{L}\\p{N}_])(${name.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")})(?![\\p{L}\\p{N}_])`;
  set({ name, mention: new RegExp(pattern, "iu") });
  save("name", name);
}
function setDraft(text, at = text.length) {
  draft.value = text;
  draft.setSelectionRange(at, at);
  draft.oninput();
}
function recall(at) {
  if (at < 0 || at > state.typed.length) return;
  if (state.at === state.typed.length) state.unsent = draft.value;
  setDraft(state.typed[at] ?? state.unsent);
  state.at = at;
}
function complete(step) {  // false where there is nothing to complete
  const head = draft.value.slice(0, draft.selectionStart), rest = draft.value.slice(draft.selectionStart);
  if (head !== state.tab?.head) {
    const start = head.search(/\S*$/), word = fold(head.slice(start)), slash = !start && word[0] === "/";
    const names = [...people.values()].reverse().map(({ name }) => name).filter((name) => !isMe(name));
    const found = (slash ? COMMANDS.map((name) => `/${name}`) : names).filter((one) => fold(one).startsWith(word));
    if (!word || !found.length) return false;
    const words = found.map((one) => one + (start || slash ? " " : ": "));
    state.tab = { before: head.slice(0, start), words, at: step > 0 ? -1 : 0 };
  }
  const { before, words } = state.tab, at = (state.tab.at + step + words.length) % words.length;
  setDraft(before + words[at] + rest, (before + words[at]).length);
  state.tab = { before, words, at, head: before + words[at] };
  return true;
}
function press(event) {
  const { key, shiftKey } = event, { value, selectionStart, selectionEnd } = draft;
  if (event.isComposing || event.keyCode === 229 || event.ctrlKey || event.altKey || event.metaKey) return;
  if (key === "Enter" && !shiftKey) submit();
  else if (key === "ArrowUp" && !value.slice(0, selectionStart).includes("\n")) recall(state.at - 1);
  else if (key === "ArrowDown" && !value.slice(selectionEnd).includes("\n")) recall(state.at + 1);
  else if (key !== "Tab" || !complete(shiftKey ? -1 : 1)) return;
  event.preventDefault();
}

// What is seen: drawn in batches, or a flood would be drawn late.
function show(line) {
  if (line.channel && line.channel !== state.channel) return;
  line.key = line.pending ? "~" : line.id ? keyOf(line.id) : state.newest;
  line.when = new Date(line.time || Date.now());
  if (!line.pending) state.newest = later(state.newest, line.key);
  state.queue.push(line);
  if (state.stuck && state.queue.length > 2 * LINES) state.queue.splice(0, LINES);
  drawSoon();
}
function drawSoon() { state.timer ||= setTimeout(draw, DRAW_MS); }
function draw() {
  if (log.scrollTop < state.scrolled) follow();
  const stuck = state.stuck, seen = (row) => row.offsetTop + row.offsetHeight > log.scrollTop;
  const top = stuck ? null : [...log.children].find(seen), before = top?.offsetTop;
  state.timer = 0;
  state.gone.splice(0).forEach((ref) => forget(state.rows.get(ref)));
  state.queue.splice(0).forEach(place);
  while (log.childElementCount > (stuck ? LINES : MOST_LINES)) forget(log.firstElementChild, true);
  if (stuck) toBottom();
  else if (top) log.scrollTop += top.offsetTop - before;
  look();
}
function toBottom() { log.scrollTop = log.scrollHeight; set({ stuck: true, scrolled: log.scrollTop }); }
function follow() { state.stuck = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX; }
function place(line) {  // puts a line where it belongs, once
  const { pending, ref, id, type, mine, replayed, key } = line, name = pending ? ref : id;
  const other = !mine && type !== "system";
  if (state.rows.has(name) || (pending && !state.pending.includes(line))) return;
  let next = null;
  for (let last = log.lastElementChild; last?.line.key > key; last = last.previousElementSibling) next = last;
  const row = log.insertBefore(build(line), next);
  if (name) state.rows.set(name, row);
  if (other && !state.fresh && (replayed ? state.seen && key > state.seen : !attentive())) {
    row.classList.add("new"); state.fresh = row;
  }
  if (other && !next && !state.stuck) state.below++;
  arrange(row);
  if (next) arrange(next);
}
function arrange(row) {  // what depends on the line before it
  const { type, user, to, when, action } = row.line, last = row.previousElementSibling?.line, day = dates.format(when);
  if (last && dates.format(last.when) === day) delete row.dataset.day;
  else row.dataset.day = day;
  const apart = row.dataset.day || row === state.fresh || last.action || when - last.when > GROUP_MS;
  const follows = !apart && last.type === type && last.user === user && last.to === to;
  row.classList.toggle("first", type !== "system" && !action && !follows);
}
function build(line) {
  const { type, user, to, action, mine, pending, replayed, look, when } = line, system = type === "system";
  const mention = !mine && !system && state.mention.test(line.text), name = named("b", user || "");
  const looks = [type, look, mention && "mention", action && "action", pending && "pending", replayed && "past"];
  const time = element("time", "", [clock.format(when)], { dateTime: when.toISOString() });
  const text = element("span", "text", linked(line.text.split("\n").map(safe).join("\n"), mention));
  const tag = type === "private" ? element("span", "tag", [mine ? `to ${safe(to)}, private` : "private"]) : "";
  const said = action ? [name, " ", text, tag, time] : [element("span", "head", [name, tag, time]), text];
  const values = { line, title: when.toLocaleString() };
  return element("div", `line ${looks.filter(Boolean).join(" ")}`, system ? [text, time] : said, values);
}
function linked(text, mention) {  // a text's links, and one's own name in it, as elements
  return text.split(/(https?:\/\/[^\s<>"]+)/iu).flatMap((part, at) => {
    const url = bare(part), words = mention ? part.split(state.mention) : [part];
    if (at % 2 === 0) return words.map((word, nth) => (nth % 2 ? element("mark", "", [word]) : word));
    const values = { href: url, target: "_blank", rel: "noopener noreferrer" };
    return [element("a", "", [url], values), part.slice(url.length)];
  });
}
function bare(url) {  // without what belongs to the sentence: punctuation, and brackets that were open before
  const cut = url.replace(/[.,;:!?'"”’»…]+$/u, ""), last = cut.at(-1), open = { ")": "(", "]": "[", "}": "{" }[last];
  return open && cut.split(last).length > cut.split(open).length ? bare(cut.slice(0, -1)) : cut;
}
function forget(row, older = state.older) {
  state.rows.delete(row?.line.pending ? row.line.ref : row?.line.id);
  state.older = older;
  row?.remove();
}
function clear() {
  log.replaceChildren();
  set({ rows: new Map(), queue: [], fresh: null, below: 0, older: false, stuck: true, synced: "" });
}
function look() {  // draws what is not a line
  if (attentive()) set({ seen: state.newest, unread: 0 });
  if (state.stuck) state.below = 0;
  const { below, unread, channel, wanted, notice, tries, joined, action, topic } = state, place = channel || wanted;
  const what = joined ? "" : notice || (tries ? "Connection lost. Trying again …" : "");
  const texts = { newer: below ? `${below} new below` : "", channel: place, topic: safe(topic), what,
    act: notice ? action : "Try now" };
  for (const [id, text] of Object.entries(texts)) if ($(id).textContent !== text) $(id).textContent = text;
  document.title = `${unread ? `(${unread}) ` : ""}${place}`;
  draft.placeholder = `Message ${place}`;
  $("newer").hidden = !below;
  $("status").hidden = !what;
  $("people").hidden = wide.matches === state.toggled;
  $("toggle").setAttribute("aria-expanded", !$("people").hidden);
  log.setAttribute("aria-busy", !state.caught);
  if (state.stale) listed();
}
function listed() {
  const rank = (person) => ["@", "+", ""].indexOf(person.rank), words = { "@": "operator", "+": "voice" };
  const order = (one, other) => rank(one) - rank(other) || one.name.localeCompare(other.name);
  const rows = [...people.values()].sort(order).slice(0, PEOPLE).map((person) => {
    const more = [isMe(person.name) && "you", words[person.rank], person.away && "away"].filter(Boolean).join(", ");
    const button = named("button", person.name, { onclick: () => address(person.name), tabIndex: -1 });
    return element("li", "", [button, more]);
  });
  $("list").replaceChildren(...rows); $("toggle").textContent = `${people.size} here`;
  state.stale = false;
}
function address(name) {
  const at = draft.selectionStart, before = draft.value.slice(0, at) + name + (at ? " " : ": ");
  setDraft(before + draft.value.slice(at), before.length);
  state.toggled &&= wide.matches; draft.focus(); drawSoon();
}
function ask(text, password) {
  state.asking = true; $("entry").hidden = !($("room").hidden = true);
  $("place").textContent = state.wanted;
  $("refusal").textContent = password && !state.password ? "This chat wants a password" : text;
  $("secret").hidden &&= !password; $("name").value = state.name;
  $(password ? "password" : "name").focus();
}
function begin() {
  state.asking = false; $("room").hidden = !($("entry").hidden = true);
  if (wide.matches) draft.focus();
  draft.oninput();
  if (isOpen()) enter();
  else connect();
}
function leaveOff() {  // what comes while nobody looks will be marked as new
  save("seen", state.seen);
  if (state.stuck) state.fresh = state.fresh?.classList.remove("new");
}

// What the browser tells.
$("entry").onsubmit = (event) => {
  event.preventDefault();
  setName($("name").value.trim());
  save("password", set({ chosen: true, password: $("password").value }).password);
  begin();
};
$("composer").onsubmit = (event) => { event.preventDefault(); submit(); };
$("act").onclick = () => (state.socket ? join(state.wanted, state.key) : connect());
$("newer").onclick = () => { toBottom(); look(); };
$("toggle").onclick = () => { state.toggled = !state.toggled; drawSoon(); };
$("notify").onclick = () => Notification.requestPermission().then(() => { $("notify").hidden = true; });
$("notify").hidden = !window.isSecureContext || window.Notification?.permission !== "default";
draft.onkeydown = press;
draft.onpaste = (event) => { state.pasted ||= event.clipboardData.getData("text").trim().includes("\n"); };
draft.oninput = () => {
  save("draft", draft.value);
  state.pasted &&= draft.value !== "";
  draft.style.height = "auto";
  draft.style.height = `${draft.scrollHeight + 2}px`;
};
log.onscroll = () => {
  follow();
  const wants = state.older && state.caught && !state.fetching && log.childElementCount < MOST_LINES - PAGE;
  const first = wants && log.scrollTop < 300 && [...log.children].find((row) => row.line.id);
  if (first) fetchLines("before", first.line.id, (more) => { state.older = more; });
  look();
};
new ResizeObserver(() => { if (state.stuck) toBottom(); }).observe(log);
window.visualViewport?.addEventListener("resize", () => {  // Safari's keyboard covers the page, which stays as high
  if (visualViewport.scale === 1) document.body.style.height = `${visualViewport.height}px`;
});
for (const name of ["online", "pageshow", "focus"]) addEventListener(name, () => { wake(); look(); });
for (const name of ["blur", "pagehide"]) addEventListener(name, leaveOff);
document.onvisibilitychange = () => { if (document.hidden) leaveOff(); else wake(); look(); };
addEventListener("offline", () => { if (state.socket) lost({}); });
addEventListener("hashchange", () => join(asked()));
addEventListener("keydown", ({ key }) => { if (key === "Escape") drawSoon((state.toggled &&= wide.matches)); });
wide.onchange = drawSoon;
setInterval(tick, 1000);
save("token", state.token);
setDraft(load("draft") || "");
if (state.name) begin(setName(state.name));
else ask("");
</script>
</html>
"""

# -----------------------------------------------------------------------------
# dialects
# -----------------------------------------------------------------------------

# What telnet programs put between the text, RFC 854: CR NUL; IAC with WILL, WONT, DO or DONT and an option; with a
# subnegotiation, which nobody may send as we agree to none; with a single byte; and the beginning of one of them.
TELNET = re.compile(
    rb"\r\0|\xff([\xfb-\xfe])(.)|\xff\xfa(?:[^\xff]|\xff\xff){0,40}\xff\xf0|\xff([\xec-\xf9\xff])"
    rb"|(\r\Z|\xff(?:[\xfb-\xfe]|\xfa(?:[^\xff]|\xff\xff){0,40}\xff?)?\Z)",
    re.DOTALL,
)
TELNET_REFUSAL = {b"\xfb": b"\xff\xfe", b"\xfd": b"\xff\xfc"}  # WILL: DONT, DO: WONT
ARE_YOU_THERE = b"\xf6"
IRC_FIRST = re.compile(rb"(CAP|NICK|USER|PASS|PING) +(?!\S+ HTTP/\d\.\d\s*\Z)[^ ]", re.IGNORECASE)
JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?')  # also one without an end, lest the search begin anew within it
TLS_HANDSHAKE = 0x16  # first byte of a TLS ClientHello: RFC 8446, section 5.1

RESUME_CAP = "chat.py/resume"
REDACT_CAP = "draft/message-redaction"
MULTILINE_CAP = "draft/multiline"
SPEAK_CAP = "chat.py/speak"  # may speak in a channel that it could join, so that nobody sees it come and go
CAPABILITIES = (
    "away-notify", "batch", "cap-notify", "chat.py/resume", "chat.py/speak", "chghost", "draft/chathistory",
    "draft/message-redaction", "draft/multiline", "echo-message", "extended-join", "extended-monitor",
    "invite-notify", "labeled-response", "message-tags", "multi-prefix", "server-time", "setname",
    "standard-replies", "userhost-in-names",
)  # fmt: skip
CAP_VALUES = {MULTILINE_CAP: f"=max-bytes={MULTILINE_BYTES},max-lines={MULTILINE_LINES}"}  # in CAP LS 302
# By which capability a client gets a tag; others by message-tags, and that one by none.
TAG_CAPS = {"time": "server-time", "batch": "batch", "label": "labeled-response", FOR_TAG: ""}
# Commands that others do not get, or not as they are; a prompt nobody does.
CAPS_NEEDED = {
    "TAGMSG": "message-tags", "PROMPT": "none", "RAW": "none", "JOIN": "extended-join", "FAIL": "standard-replies",
    "REDACT": REDACT_CAP,
}  # fmt: skip
# Whose errors are FAIL, also without standard-replies.
FAIL_CAPS = frozenset({"draft/chathistory", REDACT_CAP, MULTILINE_CAP})


def decode_text(line: bytes) -> str:
    """The text of a line; raises CommandError where it is none, or would be broken in two somewhere on its way."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise CommandError(FAIL_INVALID_UTF8) from None
    if "\0" in text or "\r" in text or "\n" in text:
        raise CommandError(FAIL_BAD_CHARACTER)
    return text


class TelnetBuffer(LineBuffer):
    """A LineBuffer for somebody who may sit at telnet, in which the telnet protocol is no text but is answered.

    CR NUL ends a line, too (RFC 1123, section 3.3.1). Every option is refused, TIMING-MARK as well (RFC 860), for which
    a telnet waits that was interrupted.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.begun = False  # there was text
        self.crlf = False  # a line ended in CRLF
        self.answers = bytearray()  # to be sent
        self._unfinished = b""

    def feed_telnet(self, data: bytes) -> list[bytes | None]:
        """The same as `feed`, of somebody who has not shown yet to be no telnet."""
        data, self._unfinished = self._unfinished + data, b""
        if b"\xff" in data or b"\r" in data:
            data = TELNET.sub(self._take, data)
        self.begun = self.begun or bool(data)
        self.crlf = self.crlf or b"\r\n" in data
        return self.feed(data)

    def _take(self, match: re.Match[bytes]) -> bytes:
        verb, option, single, self._unfinished = match.groups(b"")
        if verb in TELNET_REFUSAL:
            self.answers += TELNET_REFUSAL[verb] + option
        elif single == ARE_YOU_THERE:
            self.answers += b"*** Yes, the chat is here\r\n"
        if match[0] == b"\r\0":
            return b"\r\n"
        return single if single == b"\xff" else b""


class Dialect:
    """What a connection speaks. Sessions share an instance, and so what it encodes."""

    end = "\n"  # of the lines that it is sent
    caps: frozenset[str] = frozenset()  # IRCv3 capabilities in force
    single = True  # in one channel at a time
    unended = True  # what comes after the last line's end is a line, too
    pings = False  # answers PING

    def decode(self, line: bytes, registered: bool) -> list[Message]:
        """The commands in a line; raises CommandError."""
        raise NotImplementedError

    def encode(self, message: Message) -> bytes:
        """The bytes that tell of a message; b'' where this dialect says nothing."""
        raise NotImplementedError

    def encode_lines(self, lines: Lines) -> bytes:
        """The same of several messages."""
        return b"".join(map(self.encode, lines.messages()))


def registration_commands(nick: str, by: str, channel: str = DEFAULT_CHANNEL, password: str = "") -> list[Message]:
    """What an IRC client would send to enter: a password, a name (none: the server chooses one), a user, a channel."""
    first = Message("NICK", (nick,)) if nick else Message("GUEST")
    knock = [Message("PASS", (password,))] if password else []
    return [*knock, first, Message("USER", (by, "0", "*", f"{by} user")), Message("JOIN", (channel,))]


class Plain(Dialect):
    """Lines as a person types and reads them, in nc or telnet. Made by `plain`, so that equal views are one object."""

    def __init__(self, end: str = "\n") -> None:
        self.end = end

    def decode(self, line: bytes, registered: bool) -> list[Message]:
        text = decode_text(line)
        if not text.strip():
            return []
        if registered or text.strip() == "exit" or text.startswith("/quit"):
            return [parse_input(text, CURRENT_CHANNEL)]
        return registration_commands(text.strip(), "plain")

    def encode(self, message: Message) -> bytes:
        if message.command in ("PROMPT", "RAW"):
            return message.text.encode("latin-1")
        if LINES_TAG in message.tags:
            return b"".join(map(self.encode, each_line(message)))
        text = text_form(message)
        return f"{text}{self.end}".encode() if text else b""


class PlainPassword(Plain):
    """The same, while the next line is the password of somebody who has given a name."""

    def __init__(self, end: str, nick: str) -> None:
        super().__init__(end)
        self.nick = nick

    def decode(self, line: bytes, registered: bool) -> list[Message]:
        text = decode_text(line)
        if text.strip() == "exit":
            return [Message("QUIT")]
        return [Message("PASS", (text,)), *registration_commands(self.nick, "plain")]


class Json(Dialect):
    """A JSON object a line, for scripts."""

    caps = frozenset({"labeled-response", MULTILINE_CAP, RESUME_CAP})  # ref and ack are what label and ACK are on IRC
    # A field more: a parameter, or the text.
    MORE = {"nick": ("name", 0), "kick": ("name", 1), "topic": ("topic", -1), "redact": ("id", 1)}
    # Commands with a channel: in which parameter.
    CHANNEL_AT = {
        **dict.fromkeys(("JOIN", "PART", "KICK", "MODE", "TOPIC", "NOTICE", "REDACT"), 0),
        **dict.fromkeys(("INVITE", "322", "324", "331", "332", "346", "347", "348", "349", "367", "368"), 1),
        **dict.fromkeys(("341", "353"), 2),
    }

    def decode(self, line: bytes, registered: bool) -> list[Message]:
        item = self._load(decode_text(line))
        ref = self._field(item, "ref", "")
        try:
            messages = self._messages(item, registered)
        except CommandError as error:
            error.message = NO_MESSAGE._replace(tags={"label": ref} if ref else NO_TAGS)
            raise
        return [message._replace(tags={**message.tags, "label": ref}) for message in messages] if ref else messages

    def encode(self, message: Message) -> bytes:
        if message is PROMPT_END:
            return b"\n"
        item = self._describe(message)
        if not item:
            return b""
        for key, tag in (("ref", "label"), ("id", "msgid"), ("time", "time")):
            if tag in message.tags:
                item.setdefault(key, message.tags[tag])
        if REPLAYED_TAG in message.tags:
            item["replayed"] = True
        return f"{json.dumps(item)}\n".encode()

    @staticmethod
    def _load(text: str) -> dict[str, Any]:
        if text.count("[") + text.count("{") > JSON_NESTING:
            bare = JSON_STRING.sub("", text)
            if bare.count("[") + bare.count("{") > JSON_NESTING:
                raise CommandError(FAIL_BAD_JSON)
        try:
            item = json.loads(text)
        except ValueError:  # JSONDecodeError, or a number of too many digits
            item = None
        if not isinstance(item, dict):
            raise CommandError(FAIL_BAD_JSON)
        return item

    @staticmethod
    def _field(item: dict[str, Any], key: str, default: str | None = None) -> str:
        value = item.get(key, default)
        if not isinstance(value, str):
            raise CommandError(FAIL_BAD_FIELD, key)
        return decode_text(value.encode(errors="surrogatepass"))  # half of a surrogate pair is not UTF-8

    @staticmethod
    def _say(target: str, item: dict[str, Any]) -> list[Message]:
        """PRIVMSG; for a text with line breaks what an IRC client would send."""
        text = item.get("text")
        lines = text.strip("\n").split("\n") if isinstance(text, str) else [text]
        if len(lines) > MULTILINE_LINES:  # perhaps thousands, each of which would be looked at under the lock
            raise CommandError(FAIL_MULTILINE_LINES, str(MULTILINE_LINES))
        said = [Message("PRIVMSG", (target, Json._field({"text": line}, "text"))) for line in lines]
        if len(said) == 1:
            return said
        batch = [line._replace(tags={"batch": "json"}) for line in said]
        return [Message("BATCH", ("+json", MULTILINE_CAP, target)), *batch, Message("BATCH", ("-json",))]

    def _messages(self, item: dict[str, Any], registered: bool) -> list[Message]:
        kind = item.get("type")
        if kind == "join":
            return self._join(item, registered)
        if kind == "history":
            sides = [side for side in ("after", "before") if side in item]
            reference = f"msgid={self._field(item, sides[0])}" if sides else "*"
            words = (*sides[:1], "latest")[0], self._field(item, "channel"), reference, str(PAGE_LINES)
            return [Message("CHATHISTORY", words)]
        if kind == "ping":
            return [Message("PING", ("ping",))]
        if kind == "chat":
            return self._say(CURRENT_CHANNEL, item)
        if kind == "private":
            to = self._field(item, "to")
            if to == CURRENT_CHANNEL or is_channel(to) or set(to) & set(", "):  # one recipient, which is a name
                raise CommandError(ERR_NOSUCHNICK, to)
            return self._say(to, item)
        if kind == "command":
            return [parse_input(self._field(item, "text"), CURRENT_CHANNEL)]
        if kind == "leave":
            return [Message("QUIT", (self._field(item, "text", ""),))]
        raise CommandError(FAIL_BAD_TYPE)

    def _join(self, item: dict[str, Any], registered: bool) -> list[Message]:
        user, password = self._field(item, "user", ""), self._field(item, "password", "")
        *steps, last = registration_commands(user, "json", self._field(item, "channel", DEFAULT_CHANNEL), password)
        token, tags = self._field(item, "token", ""), {NO_REPLAY_TAG: ""} if item.get("replay") is False else {}
        if token and not 16 <= len(token) <= 64:
            raise CommandError(FAIL_BAD_TOKEN, "token")
        if registered and user:
            check_nick(user)
        steps[:0] = [Message("RESUME", (token,))] if token else []
        join = last._replace(params=(*last.params, self._field(item, "key", "")), tags=tags)
        return [join] if registered else [*steps, join]

    @staticmethod
    def _event_of(message: Message) -> tuple[str, str]:
        """The same as event_of, also for who is away now, which on IRC takes a capability."""
        if message.command != "AWAY":
            return event_of(message)
        nick, text = escape_controls(message.nick), escape_controls(message.text)
        return ("away", f"{nick} is away: {text}") if message.params else ("back", f"{nick} is back")

    @staticmethod
    def _describe(message: Message) -> dict[str, Any]:
        if message.command in ("ACK", "PONG"):
            return {"type": message.command.lower()}
        if not is_system(message):
            channel = message.param(0)
            action = message.action
            said = {"type": "chat", "user": message.nick, "text": whole_text(message), "channel": channel}
            if not is_channel(channel):
                said = {"type": "private", "user": message.nick, "text": whole_text(message), "to": channel}
            return said if action is None else {**said, "text": action, "action": True}
        name, text = Json._event_of(message)
        if not text:
            return {}
        if text.startswith("Error: "):
            code = message.param(1).lower().replace("_", "-") if message.command == "FAIL" else name
            return {"type": "error", "code": code, "text": text[len("Error: ") :]}
        item: dict[str, Any] = {"type": "system", "event": name, "text": f"*** {text}"}
        if "!" in message.source:
            item["user"] = message.nick
        channel = message.param(Json.CHANNEL_AT.get(message.command, MAX_PARAMS))
        if channel.startswith(tuple(CHANNEL_TYPES)):
            item["channel"] = channel
        if name in Json.MORE:
            key, at = Json.MORE[name]
            item[key] = message.text if at < 0 else message.param(at)
        elif name == "names":
            users = [word for word in message.text.split() if word != "(away)"]
            item["users"] = [user.lstrip("@+") for user in users]
            item["ranks"] = [user[: len(user) - len(user.lstrip("@+"))] for user in users]
        return item


class Irc(Dialect):
    """IRC: RFC 1459 and 2812 with IRCv3 capabilities. Made by `irc`."""

    end = "\r\n"
    single = False
    unended = False  # RFC 1459: a line without its end is not a message, but what is left of one
    pings = True

    def __init__(self, caps: frozenset[str] = frozenset()) -> None:
        self.caps = caps
        self._multiline = caps >= {"batch", MULTILINE_CAP}

    def decode(self, line: bytes, registered: bool) -> list[Message]:
        try:
            if len(line) > LINE_BYTES - 2:
                self._check_size(line)
            message = parse(decode_text(line))
            if LINES_TAG in message.tags:  # of which only we make use
                message = message._replace(tags={tag: message.tags[tag] for tag in message.tags if tag != LINES_TAG})
        except CommandError as error:
            rough = parse(line.decode(errors="replace"))
            command = rough.command if re.fullmatch("[A-Z]{1,20}", rough.command) else ""
            label = rough.tags.get("label", "")
            error.message = Message(command, tags={"label": label} if label.isprintable() and label else NO_TAGS)
            raise
        return [message] if message.command else []

    @staticmethod
    def _check_size(line: bytes) -> None:
        size = len(line) + 2
        if line.startswith(b"@"):
            tags = len(line.partition(b" ")[0])
            size -= tags + 1
            if tags > TAG_BYTES + 1:
                raise CommandError(ERR_INPUTTOOLONG)
        if size > LINE_BYTES:
            raise CommandError(ERR_INPUTTOOLONG)

    def encode(self, message: Message) -> bytes:
        if message is PROMPT_END:
            return b"\r\n"
        needed = CAPS_NEEDED.get(message.command) or message.tags.get(FOR_TAG)
        if needed and needed not in self.caps:
            message = self._fallback(message)
            if message is NO_MESSAGE:
                return b""
        if LINES_TAG in message.tags:
            return b"".join(map(self.encode, self._batch(message) if self._multiline else each_line(message)))
        if not self.caps:
            return f"{format_line(message)}\r\n".encode()
        wanted = [item for item in message.tags.items() if TAG_CAPS.get(item[0], "message-tags") in self.caps]
        return f"{format_tags(wanted)}{format_line(message)}\r\n".encode()

    @staticmethod
    def _batch(message: Message) -> list[Message]:
        """A message of several lines as the batch that it was sent in (IRCv3 draft/multiline)."""
        target, reference = message.param(0), message.tags["msgid"]
        tags = {tag: value for tag, value in message.tags.items() if tag != LINES_TAG}
        concat = {"batch": reference, CONCAT_TAG: ""}
        lines = [
            message._replace(params=(target, line.text), tags=concat if line.goes_on else {"batch": reference})
            for line in split_lines(message)
        ]
        first = Message("BATCH", (f"+{reference}", MULTILINE_CAP, target), message.source, tags)
        return [first, *lines, Message("BATCH", (f"-{reference}",), message.source)]

    def _fallback(self, message: Message) -> Message:
        """What a client gets instead that has not negotiated a capability; NO_MESSAGE for nothing."""
        if message.command == "JOIN":
            return message._replace(params=message.params[:1])
        if message.command == "REDACT":
            return message._replace(command="NOTICE", params=(message.param(0), cut(text_form(message), TOPIC_BYTES)))
        if message.command != "FAIL":
            return NO_MESSAGE
        known = message.param(1) == "INVALID_UTF8" or not FAIL_CAPS.isdisjoint(self.caps)  # IRCv3 UTF8ONLY
        return message if known else Message("NOTICE", ("*", message.text), message.source, message.tags)

    def encode_lines(self, lines: Lines) -> bytes:
        head = self.encode(lines.message._replace(params=(*lines.message.params, "")))[:-2]  # up to the colon
        return head + "\n".join(lines.texts).encode().replace(b"\n", b"\r\n" + head) + b"\r\n"


# Nearly always one for all who negotiated the same capabilities: what they get is encoded once. Nothing relies on that.
irc = functools.lru_cache(maxsize=IRC_DIALECTS)(Irc)


class Framed(Dialect):
    """What another dialect sends, a WebSocket message for each line, without its end. Made by `framed`."""

    def __init__(self, dialect: Dialect, opcode: int) -> None:
        self.dialect, self._opcode = dialect, opcode

    def encode(self, message: Message) -> bytes:
        if message.command == "RAW":
            return message.text.encode("latin-1")
        if message.command == "PING":  # which a browser answers by itself
            return frame(WS_PING, b"")
        data = self._frame(self.dialect.encode(message))
        if message.command == "ERROR":
            data += close_frame(CLOSE_CODES.get(message.text, POLICY_VIOLATION), message.text)
        return data

    def encode_lines(self, lines: Lines) -> bytes:
        return self._frame(self.dialect.encode_lines(lines))

    def _frame(self, data: bytes) -> bytes:
        return b"".join([frame(self._opcode, line.rstrip(b"\r")) for line in data.split(b"\n")[:-1]])


framed = functools.lru_cache(maxsize=IRC_DIALECTS)(Framed)


class Http(Json):
    """One request and its answer. What POST says are commands, and their receipts become the answer."""

    caps = Json.caps | {SPEAK_CAP}
    STATUS = {  # by the code of an error, or by the last words
        "wrong-password": 401, "banned": 403, "banned-from-channel": 403, "cannot-send": 403, "invite-only": 403,
        "bad-key": 403, "channel-full": 403, "name-taken": 409, "cannot-store": 503, RESUMED_ELSEWHERE: 409,
        "Server is shutting down": 503,
    }  # fmt: skip

    def __init__(self, first: bytes = b"") -> None:
        self.request: Request | None = None
        self.body = self.interim = b""  # interim: to be answered before the body comes (RFC 9110, section 10.1.1)
        self._data = first + b"\n"
        self._channel = DEFAULT_CHANNEL
        self._said = 0  # lines of the body
        self._ids: list[str] = []  # of what was said; the mailer's
        self._error: dict[str, Any] = {}  # the first; the mailer's

    def feed(self, data: bytes) -> bytes | None:
        """What follows the request, once it is complete; raises HttpError."""
        start = max(len(self._data) - 2, 0)
        self._data += data
        if not self.request:
            end = re.compile(rb"\n\r?\n").search(self._data, start)
            if (end.start() if end else len(self._data)) > HTTP_BYTES:
                raise HttpError(431)
            if not end:
                return None
            self.request = parse_request(self._data[: end.start()])
            self._data = self._data[end.end() :]
            if "100-continue" in self.request.items("Expect"):
                self.interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        length = self.request.body_length()
        if len(self._data) < length:
            return None
        self.body, rest = self._data[:length], self._data[length:]
        return rest

    def registration(self, request: Request) -> list[Message]:
        """The commands by which POST enters, whose Idempotency-Key is a token to resume by; raises HttpError."""
        name, key = request.query.get("name", ""), request.headers.get("Idempotency-Key")
        self._channel = with_channel_type(request.query.get("channel", DEFAULT_CHANNEL))
        token = hashlib.sha256(f"{name} {key}".encode()).hexdigest()
        resume = [Message("RESUME", (token,))] if key else []
        return [*resume, *registration_commands(name, "http", "", request.password())[:-1]]  # it need not join

    def decode(self, line: bytes, registered: bool) -> list[Message]:
        if not self.request:
            return []
        self._said += 1
        return [Message("PRIVMSG", (self._channel, decode_text(line)), tags={"label": f"{self._said}"})]

    def encode(self, message: Message) -> bytes:
        if message.command == "RAW":
            return message.text.encode("latin-1")
        if message.command == "ERROR":
            return self._answer(message.text)
        item = self._describe(message)
        if item.get("type") == "ack":
            self._ids.append(message.tags["msgid"])
        elif item.get("type") == "error":
            self._error = self._error or item
        return b""

    def _answer(self, farewell: str) -> bytes:
        """The answer at the end of the session."""
        if farewell == "Goodbye" and not self._error:
            return http_answer(200, "\n".join(self._ids))
        if not self._error and farewell.startswith("No name"):
            return http_answer(408)
        code, text = self._error.get("code", farewell), self._error.get("text", farewell)
        status = self.STATUS.get(code, 400 if self._error else 403)
        return http_answer(status, text, **({"WWW_Authenticate": 'Basic realm="chat"'} if status == 401 else {}))


plain = functools.lru_cache()(Plain)  # one for all whose lines end alike
PLAIN, JSON = plain("\n"), Json()
UNDECIDED = Plain()  # before the first line
UNDECIDED_WEB = Irc()  # before the first message of a WebSocket


def dialect_of(first: bytes, end: str = "\n", web: bool = False) -> Dialect:
    """Which dialect a connection's first line speaks, and where there is a choice, with which line ends; of a WebSocket
    its first message."""
    if first.startswith(b"{"):
        return JSON
    if web or IRC_FIRST.match(first):
        return irc()
    return Http(first) if HTTP_FIRST.match(first) else plain(end)


# -----------------------------------------------------------------------------
# history
# -----------------------------------------------------------------------------
# What was said in channels. A message's sequence number is its msgid; it grows in the order in which all see messages.


class MessageIds:
    """Allocates message ids: Unix time in microseconds, made to increase even when the clock stands still or goes back.

    `last` is the highest one that is stored. Where the clock was set back to before it, those are skipped that may
    have been given out after it.
    """

    def __init__(self, last: int = 0) -> None:
        self.last = last + 1_000_000_000 * (last > time.time() * 1e6)

    def next(self) -> dict[str, str]:
        """The tags `time` and `msgid` of one more message."""
        now = time.time()
        self.last = max(self.last + 1, int(now * 1e6))
        return {"time": server_time(now), "msgid": f"{self.last:x}"}


def sequence(message: Message) -> int:
    """The sequence number of a message with an id."""
    return int(message.tags["msgid"], 16)


def parse_reference(reference: str) -> tuple[int, int]:
    """The first and the last sequence number that `msgid=...` or `timestamp=...` may mean; raises ValueError."""
    kind, _, value = reference.partition("=")
    if kind == "msgid" and re.fullmatch("[0-9a-f]{1,15}", value):
        return int(value, 16), int(value, 16)
    if kind == "timestamp" and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", value, re.ASCII):
        second = calendar.timegm(time.strptime(value[:19], "%Y-%m-%dT%H:%M:%S"))
        first = second * 1_000_000 + int(value[20:23]) * 1000
        return first, first + 999
    raise ValueError(reference)


def strip_private_tags(message: Message, **more: str) -> Message:
    """A message from the history as others may get it."""
    return message._replace(tags={**{key: value for key, value in message.tags.items() if key != BY_TAG}, **more})


def private_log(*identities: str) -> str:
    """The name of the log of what two sessions, or one by itself, have said to nobody else: see Session.identity."""
    return f" {' '.join(sorted(set(identities)))} "


DedupKey = Tuple[str, str, str]  # a sender's token, the id that it gave to a message, the folded target


def dedup_key(message: Message) -> DedupKey | None:
    """By which a resend of a message in the history is recognised, if its sender may resend it."""
    tags = message.tags
    return (tags[BY_TAG], tags[ID_TAG], fold(message.param(0))) if BY_TAG in tags and ID_TAG in tags else None


class ChannelState(NamedTuple):
    """What has to be kept of a channel from now on."""

    channel: str  # folded
    state: str  # see Channel.state; '' where there is nothing to restore


class StorageError(Exception):
    """Messages cannot be stored or read; the text says why."""


class MemoryHistory:
    """The last MEMORY_LINES messages of each log, by its name, in memory: see Channel.logs. Only the mailer uses it."""

    in_use: Callable[[str], bool] = staticmethod(lambda name: False)  # whether a log is one of a channel with members

    def __init__(self) -> None:
        # Sequence numbers beside their messages; the channel used last is last.
        self._channels: dict[str, tuple[collections.deque[int], collections.deque[Message]]] = {}
        self._lines = 0  # in all
        self._keys: dict[DedupKey | None, Message] = {}

    def append(self, messages: list[tuple[str, Message]], states: Sequence[ChannelState] = ()) -> None:
        """Stores messages, each with its log's name, and states: all of them, or none and raises StorageError."""
        for name, message in messages:
            kept = self._channels.pop(name, None) or (collections.deque(), collections.deque())
            self._channels[name] = kept
            kept[0].append(sequence(message))
            kept[1].append(message)
            self._lines += 1 + len(message.params[-1]) // LINE_BYTES
            self._trim(name, MEMORY_LINES)
            if ID_TAG in message.tags:
                self._keys[dedup_key(message)] = message
        if self._lines > MEMORY_TOTAL:
            self._make_room(MEMORY_TOTAL * 99 // 100)

    def _trim(self, name: str, size: int) -> None:
        """Forgets the oldest messages of a log."""
        numbers = self._channels[name][0]
        while len(numbers) > size:
            self._forget(name, 0)

    def _forget(self, name: str, at: int) -> None:
        """Forgets one message of a log."""
        numbers, messages = self._channels[name]
        message = messages[at]
        del numbers[at], messages[at]
        self._lines -= 1 + len(message.params[-1]) // LINE_BYTES
        if ID_TAG in message.tags:
            self._keys.pop(dedup_key(message), None)
        if not numbers:
            del self._channels[name]

    def remove(self, names: Sequence[str], number: int) -> None:
        """Removes the message with a number from some logs; raises StorageError."""
        for name in names:
            if number in self._channels.get(name, ((),))[0]:
                self._forget(name, self._channels[name][0].index(number))

    def _make_room(self, total: int) -> None:
        """Forgets channels without members, the least recently used first, and then the oldest of the longest."""
        for channel in [channel for channel in self._channels if not self.in_use(channel)]:
            if self._lines <= total:
                return
            self._trim(channel, 0)
        while self._lines > total:
            size = max(len(numbers) for numbers, _ in self._channels.values()) * 9 // 10
            for channel in list(self._channels):
                self._trim(channel, size)

    def fetch(self, channel: str, low: int, high: int, limit: int, newest: bool, since: str = "") -> list[Message]:
        """At most `limit` messages numbered above `low` and below `high`, in order: the newest, or the oldest.

        Of those said after the clock was set back, whose numbers are ahead of it, only those not before `since`.
        """
        numbers, messages = self._channels.get(channel, ((), ()))
        first, end = bisect.bisect_right(numbers, low), bisect.bisect_left(numbers, high)
        if not since:
            first, end = (max(first, end - limit), end) if newest else (first, min(end, first + limit))
        found = [item for item in itertools.islice(messages, first, max(end, first)) if item.tags["time"] >= since]
        return found[max(len(found) - limit, 0) :] if newest else found[:limit]

    def fetch_all(
        self, names: Sequence[str], low: int, high: int, limit: int, newest: bool, since: str = ""
    ) -> list[Message]:
        """The same of several logs together."""
        found = [item for name in names for item in self.fetch(name, low, high, limit, newest, since)]
        found.sort(key=sequence)
        return found[max(len(found) - limit, 0) :] if newest else found[:limit]

    def partners(self, identity: str) -> dict[str, tuple[str, str, Message]]:
        """With whom somebody has spoken alone: their folded nick -> the nick that they had then, log, last message."""
        found, part = {}, f" {identity} "
        for name in [name for name in self._channels if part in name]:  # if two had one nick, it stands for the last
            last = self._channels[name][1][-1]
            nick = last.param(0) if last.tags[BY_TAG] == identity else last.nick
            found[fold(nick)] = nick, name, last
        return found

    def find(self, keys: Sequence[DedupKey]) -> dict[DedupKey, Message]:
        """The messages that were stored with some keys."""
        return {key: self._keys[key] for key in keys if key in self._keys}

    def last_sequence(self) -> int:
        """The highest sequence number that is stored, or 0."""
        return max((numbers[-1] for numbers, _ in self._channels.values()), default=0)

    def states(self) -> dict[str, str]:
        """The states of channels that are to be restored, by folded name; of too many, those saved last."""
        return {}

    def prune(self) -> None:
        """Deletes some of what is too old; to be called every PRUNE_S."""

    def close(self) -> None:
        """Closes the file."""


HISTORY_TABLES = (
    "CREATE TABLE IF NOT EXISTS said (channel TEXT, number INTEGER, line TEXT, key BLOB,"
    " PRIMARY KEY (channel, number)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS said_number ON said (number)",
    "CREATE INDEX IF NOT EXISTS said_key ON said (key) WHERE key IS NOT NULL",
    "CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY, channel TEXT UNIQUE, state TEXT)",
)


def index_key(key: DedupKey | None) -> bytes | None:
    """What stands for a key in the file: those of one sender together, so that a batch changes few pages."""
    if not key:
        return None
    return hashlib.sha256(key[0].encode()).digest()[:8] + hashlib.sha256("\n".join(key[1:]).encode()).digest()[:8]


def parse_rows(rows: list[Any]) -> list[Message]:
    """The messages of rows of a line and a number, without those that are damaged."""
    lines = [(parse(str(line)), f"{number:x}") for line, number in rows]
    return [item for item, number in lines if item.tags.get("msgid") == number and "time" in item.tags]


class SqliteHistory(MemoryHistory):
    """The same in an SQLite file, without bound or for so many days. A message is stored as its IRC line with tags.

    When `append` returns, the messages survive the death of the process, and with `fsync` that of the machine. The file
    is locked by a lock on another one beside it, so that others may read it meanwhile.
    """

    def __init__(self, path: str, fsync: bool = False, days: float = math.inf, readonly: bool = False) -> None:
        self._days, self._file = days, pathlib.Path(path)
        try:
            import sqlite3
        except ImportError as error:  # Python can be built without it
            raise StorageError(f"cannot keep a history: {error}") from None
        self._errors = sqlite3.Error
        self._opened = contextlib.ExitStack()
        try:
            self._file = self._file.resolve()
            if self._file.drive.startswith("\\\\"):
                raise ValueError("it must be on a disk of this machine, not on a share")
            self._wal, lock = (self._file.with_name(f"{self._file.name}-{end}") for end in ("wal", "lock"))
            if readonly:
                # Where nobody writes, that needs no file beside it, which perhaps could not be created.
                mode = "ro" if self._wal.exists() else "ro&immutable=1"
            else:
                mode = "rw"
                for file in (lock, self._file):
                    file.touch(0o600)  # SQLite would let others read it
                try:
                    self._connect(sqlite3, lock, "rw", 0).execute("BEGIN EXCLUSIVE")
                except sqlite3.Error as error:
                    raise ValueError("another server uses it" if "locked" in str(error) else str(error)) from None
            self._db = self._connect(sqlite3, self._file, mode)
            self._check()
            if not readonly:
                self._prepare("FULL" if fsync else "NORMAL")
        except (OSError, ValueError, StorageError, sqlite3.Error) as error:
            self.close()
            raise StorageError(f"cannot use {path} as a history: {error}") from None

    def _connect(self, sqlite3: Any, path: pathlib.Path, mode: str, patience: float = STORE_S) -> Any:
        uri = f"{path.as_uri()}?mode={mode}"
        db = sqlite3.connect(uri, timeout=patience, isolation_level=None, check_same_thread=False, uri=True)
        return self._opened.enter_context(contextlib.closing(db))

    def _check(self) -> None:
        application = self._rows("PRAGMA application_id")[0][0]
        if application != SQLITE_ID and (application or self._rows("SELECT 1 FROM sqlite_master")):
            raise ValueError("it belongs to another program")
        if self._file.stat().st_size <= CHECKED_BYTES and self._rows("PRAGMA quick_check(1)") != [("ok",)]:
            raise ValueError("it is damaged; move it away, or rescue what is left with: sqlite3 FILE .recover")

    def _prepare(self, synchronous: str) -> None:
        self._rows(f"PRAGMA application_id = {SQLITE_ID}")
        self._rows("PRAGMA journal_mode = WAL")
        self._rows(f"PRAGMA synchronous = {synchronous}")
        with self._transaction():
            columns = [row[1] for row in self._rows("PRAGMA table_info(said)")]
            is_old = columns and "key" not in columns
            if is_old:
                self._rows("ALTER TABLE said ADD COLUMN key BLOB")
            for table in HISTORY_TABLES:
                self._rows(table)
            if is_old:
                rows = self._rows("SELECT channel, number, line FROM said ORDER BY number DESC LIMIT ?", MIGRATED_LINES)
                keyed = [(index_key(dedup_key(parse(row[2]))), *row[:2]) for row in rows]
                self._db.executemany("UPDATE said SET key = ? WHERE channel = ? AND number = ?", keyed)
        self._opened_files = [file.stat() for file in (self._file, self._wal)]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._rows("BEGIN IMMEDIATE")
            yield
            self._rows("COMMIT")
        except self._errors as error:
            raise StorageError(str(error)) from None
        finally:
            if self._db.in_transaction:
                self._rows("ROLLBACK")

    def _rows(self, query: str, *values: object) -> list[Any]:
        try:
            return list(self._db.execute(query, values))
        except self._errors as error:
            raise StorageError(str(error)) from None

    def _check_files(self) -> None:
        """Raises StorageError if the file and its write-ahead log are not those that were opened, or were cut off."""
        try:
            now = [file.stat() for file in (self._file, self._wal)]
        except OSError:
            raise StorageError(f"{self._file} is gone; start the server again") from None
        file_shrunk, wal_shrunk = (new.st_size < old.st_size for new, old in zip(now, self._opened_files))
        if any((new.st_dev, new.st_ino) != (old.st_dev, old.st_ino) for new, old in zip(now, self._opened_files)):
            raise StorageError(f"{self._file} is another file now; start the server again")
        is_cut = file_shrunk or wal_shrunk
        if is_cut and not file_shrunk:  # another program may have emptied the log into the file: nothing is lost then
            with contextlib.suppress(StorageError):
                is_cut = bool(self._rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0])
        if is_cut:
            raise StorageError(f"{self._file} was truncated; start the server again")
        self._opened_files = now

    def append(self, messages: list[tuple[str, Message]], states: Sequence[ChannelState] = ()) -> None:
        rows = [
            (channel, sequence(item), format_tagged(item), index_key(dedup_key(item))) for channel, item in messages
        ]
        self._check_files()
        with self._transaction():
            self._db.executemany("INSERT INTO said (channel, number, line, key) VALUES (?, ?, ?, ?)", rows)
            for channel, state in states:
                self._rows("DELETE FROM state WHERE channel = ?", channel)
                if state:
                    self._rows("INSERT INTO state (channel, state) VALUES (?, ?)", channel, state)
        self._check_files()

    def remove(self, names: Sequence[str], number: int) -> None:
        self._check_files()
        with self._transaction():
            for name in names:
                self._rows("DELETE FROM said WHERE channel = ? AND number = ?", name, number)
        self._check_files()

    def fetch(self, channel: str, low: int, high: int, limit: int, newest: bool, since: str = "") -> list[Message]:
        order = "DESC" if newest else "ASC"
        query = f"SELECT line, number FROM said WHERE channel = ? AND number > ? AND number < ? ORDER BY number {order}"
        if since:  # the time is each line's first tag
            query = f"SELECT line, number FROM ({query} LIMIT {SCANNED_LINES}) WHERE substr(line, 7, 24) >= '{since}'"
            query += f" ORDER BY number {order}"
        found = parse_rows(self._rows(f"{query} LIMIT ?", channel, low, high, limit))
        return found[::-1] if newest else found

    def find(self, keys: Sequence[DedupKey]) -> dict[DedupKey, Message]:
        found: list[Message] = []
        for start in range(0, len(keys), PAGE_LINES):
            hashes = [index_key(key) for key in keys[start : start + PAGE_LINES]]
            query = f"SELECT line, number FROM said WHERE key IN ({', '.join('?' * len(hashes))})"
            found += parse_rows(self._rows(query, *hashes))
        return {key: item for item in found for key in [dedup_key(item)] if key}

    def transcript(self, since: float, channel: str = "") -> Iterator[Message]:
        """All that was said, in order, in one channel or in all, from a Unix time on."""
        low, first = int(since * 1e6) - 1, server_time(since + 1e-6)
        condition = "number > ? AND (channel = ? OR channel > ? || ' ' AND channel < ? || '!')"  # see Channel.logs
        condition = condition if channel else "number > ? AND '' IN (?, ?, ?)"
        query = f"SELECT line, number FROM said WHERE {condition} ORDER BY number LIMIT ?"
        rows = self._rows("SELECT 1 FROM sqlite_master")  # there is nothing in an empty file
        while rows:  # page by page: while a query runs, the server cannot use the write-ahead log's space again
            rows = self._rows(query, low, channel, channel, channel, SCANNED_LINES)
            yield from (strip_private_tags(item) for item in parse_rows(rows) if item.tags["time"] >= first)
            low = rows[-1][1] if rows else low

    def last_sequence(self) -> int:
        return int(self._rows("SELECT ifnull(max(number), 0) FROM said")[0][0])

    def states(self) -> dict[str, str]:
        rows = self._rows("SELECT channel, state, id FROM state ORDER BY id DESC LIMIT ?", SAVED_CHANNELS)
        if len(rows) == SAVED_CHANNELS:
            with self._transaction():
                self._rows("DELETE FROM state WHERE id < ?", rows[-1][2])
        return {channel: state for channel, state, _ in rows}

    def prune(self) -> None:
        if self._days == math.inf:
            return
        oldest = int((time.time() - self._days * 86400) * 1e6)
        with contextlib.suppress(StorageError):  # next time, then
            query = "SELECT channel, number FROM said WHERE number < ? ORDER BY number LIMIT ?"
            rows = self._rows(query, oldest, PRUNE_LINES)
            if not rows:
                return
            with self._transaction():
                self._db.executemany("DELETE FROM said WHERE channel = ? AND number = ?", rows)

    def close(self) -> None:
        with contextlib.suppress(self._errors):
            self._opened.close()


# -----------------------------------------------------------------------------
# chat state
# -----------------------------------------------------------------------------

# The program's log: time, level, text with %s, values; None ends it.
log_records: queue.SimpleQueue[tuple[float, int, str, tuple[str, ...]] | None] = queue.SimpleQueue()


def log_later(level: int, text: str, *values: object) -> None:
    """Has a thread write to the program's log, unless too much waits. Takes no lock and never waits, so that it can be
    called under any lock and in a signal handler; with logging itself, each reader's stack would grow."""
    if log_records.qsize() < LOG_QUEUE:
        log_records.put((time.time(), level, text, tuple(map(str, values))))  # an exception would keep its frames


class TokenBucket:
    """Rate limiting: `burst` tokens at once, then one every `interval` seconds."""

    __slots__ = ("_full_at", "_interval", "_span")

    def __init__(self, burst: float, interval: float) -> None:
        self._interval = interval
        self._span = burst * interval
        self._full_at = 0.0  # monotonic: when the bucket is full again

    def allow(self, now: float) -> bool:
        """Takes a token at the monotonic time `now`; False where there is none."""
        if self.is_empty(now):
            return False
        self.debit(now)
        return True

    def debit(self, now: float, tokens: float = 1) -> float:
        """Takes tokens even if there are none; returns the seconds until they would have been available."""
        self._full_at = max(self._full_at, now) + self._interval * tokens
        return max(self._full_at - now - self._span, 0.0)

    def is_empty(self, now: float) -> bool:
        return max(self._full_at, now) + self._interval > now + self._span

    def in_debt(self, now: float) -> bool:
        """Whether the bucket is not full."""
        return self._full_at > now


Buckets = Tuple[TokenBucket, TokenBucket]  # of a client: for lines, and for changes of its nick


@functools.lru_cache(maxsize=1000)
def plain_address(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address without a zone, and an IPv4 address also where it is written as an IPv6 one; raises ValueError."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return getattr(found, "ipv4_mapped", None) or found


def digest(secret: str) -> bytes:
    """The SHA-256 of a password, which stands for it where it is kept or compared."""
    return hashlib.sha256(normalize_password(secret).encode(errors="surrogateescape")).digest()


class Address:
    """One address as limits count it: its clients, and what they may still do. Guarded by the hub's lock."""

    __slots__ = ("arrivals", "connections", "disconnected", "exempt", "key", "rows", "spent", "wrong_passwords")

    def __init__(self, key: str = "", exempt: bool = True, per_address: float = math.inf) -> None:
        self.key = key  # an IPv4 address, the /64 network of an IPv6 address, or itself where it is exempt
        self.exempt = exempt  # from the limits per address and from the rate limit
        self.connections = 0
        self.disconnected: dict[Session, None] = {}  # sessions whose connection is closed, the oldest first
        self.spent: list[Buckets] = []  # of connections that have ended: the next ones go on with them
        self.arrivals = TokenBucket(2 * per_address, CONNECT_INTERVAL_S)
        self.wrong_passwords = TokenBucket(WRONG_PASSWORDS, WRONG_S / WRONG_PASSWORDS)
        self.rows = TokenBucket(QUERY_BURST, 1 / QUERY_RATE)  # of answers

    def in_use(self, now: float) -> bool:
        """Whether anything of it has to be remembered."""
        self.spent = [buckets for buckets in self.spent if any(bucket.in_debt(now) for bucket in buckets)]
        in_debt = any(bucket.in_debt(now) for bucket in (self.arrivals, self.wrong_passwords, self.rows))
        return bool(self.connections or self.disconnected or self.spent or in_debt)

    def locked_out(self) -> bool:
        """Whether there were too many wrong passwords from it lately."""
        return self.wrong_passwords.is_empty(time.monotonic())

    def admit(self, per_address: float) -> str:
        """Counts one more connection; or returns why it is refused."""
        if self.locked_out():
            return "Too many wrong passwords; try again later"
        if not self.exempt and self.connections >= per_address:
            return "Too many connections from your address"
        if not self.exempt and not self.arrivals.allow(time.monotonic()):
            return "Too many new connections from your address; wait a little"
        self.connections += 1
        return ""

    def buckets(self, limits: Limits) -> Buckets | None:
        """The rate limits of a new connection: as a former one has left them."""
        if limits.rate == math.inf or self.exempt:
            return None
        new = TokenBucket(limits.burst, 1 / limits.rate), TokenBucket(NICK_CHANGES, NICK_CHANGE_S)
        return self.spent.pop() if self.spent else new

    def release(self, session: Session) -> None:
        """The connection of a session has ended."""
        self.connections -= 1
        if session.flood_bucket:
            self.spent.append((session.flood_bucket, session.nick_bucket))
        if session.stage == Stage.DISCONNECTED:
            self.disconnected[session] = None


class AccessControl:
    """Who may connect: bans, the password, addresses. Guarded by the hub's lock."""

    def __init__(self, exempt: str = LOOPBACK, password: str = "") -> None:
        self.banned: dict[str, str] = {}  # key of an address or folded nick -> as the operator wrote it
        self.password_required = bool(password)
        self._digest = digest(password)
        self._exempt = [ipaddress.ip_network(network.strip()) for network in exempt.split(",") if network.strip()]
        self._addresses: dict[str, Address] = {}  # by key
        self.browsers: dict[str, None] = {}  # keys of those from which HTTP came, the oldest first
        self._swept = 0.0  # monotonic: when those were last dropped of which nothing has to be remembered

    def address(self, text: str, per_address: float = math.inf) -> Address:
        """What is known of an address; raises ValueError."""
        found = plain_address(text)
        exempt = any(found in network for network in self._exempt)
        key = str(found)
        if found.version == 6 and not found.is_loopback and not exempt:
            key = str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))
        now = time.monotonic()
        if now > self._swept + SWEEP_S:
            self._swept = now
            self._addresses = {known: item for known, item in self._addresses.items() if item.in_use(now)}
        if key not in self._addresses:
            self._addresses[key] = Address(key, exempt, per_address)
        return self._addresses[key]

    def add_browser(self, address: Address) -> None:
        """HTTP has come from an address."""
        self.browsers.pop(address.key, None)
        self.browsers[address.key] = None
        if len(self.browsers) > BROWSERS:
            del self.browsers[next(iter(self.browsers))]

    def admit(self, address: Address, per_address: float) -> str:
        """Counts one more connection; or returns why it is refused."""
        return "You are banned from this server" if address.key in self.banned else address.admit(per_address)

    def oldest_disconnected(self) -> Session | None:
        """The oldest disconnected session of the address that has most of them."""
        most: Collection[Session] = max((item.disconnected for item in self._addresses.values()), key=len, default=())
        return next(iter(most), None)

    def check_password(self, address: Address, password: str) -> bool:
        """Whether the password is right. After too many wrong ones from the address, False whatever it is."""
        if address.locked_out():
            return False
        if len(password) > PASSWORD_BYTES or not hmac.compare_digest(digest(password), self._digest):
            address.wrong_passwords.debit(time.monotonic())
            return False
        address.wrong_passwords = TokenBucket(WRONG_PASSWORDS, WRONG_S / WRONG_PASSWORDS)
        return True


SIGNS = {"": "", "o": "@", "v": "+", "ov": "@+"}  # rank -> prefixes in NAMES and WHO
NAMES_CAPS = frozenset({"multi-prefix", "userhost-in-names"})  # on which the form of names in 353 depends


def signs(rank: str, caps: frozenset[str]) -> str:
    """The prefix of a member's name as a client with these capabilities gets it: one sign, or all."""
    return SIGNS[rank] if "multi-prefix" in caps else SIGNS[rank][:1]


def discard(data: bytes, flags: int) -> int:
    """The `send` of a session without a connection."""
    return len(data)


class Stage:
    """How far a session has come. Not an Enum: each message asks several times, which CPython 3.11 takes 0.2 us for."""

    NEW = 0  # nothing was received
    HANDSHAKING = 1  # TLS is being set up, or waited for; nothing is sent
    PROMPTED = 2  # has been asked for a name, and has not sent a line
    REGISTERING = 3  # has sent something
    REGISTERED = 4
    DISCONNECTED = 5  # registered, its connection is lost; it may resume
    GONE = 6  # no longer in the hub; its input is ignored


class Session:
    """A client, registered or not. Guarded by the hub's lock, but for what one thread alone uses."""

    __slots__ = (
        "address", "audiences", "authenticated", "away", "batch", "channels", "connected_at", "crlf", "deadline",
        "dialect", "flood_bucket", "host", "identity", "invites", "last_id", "last_received", "last_spoke", "modes",
        "monitored", "negotiating", "nick", "nick_bucket", "opcode", "output", "ping_sent", "pong_deadline", "prefix",
        "quit_reason", "realname", "resume_queue", "send", "sent", "signon", "stage", "token", "user",
        "wrong_password",
    )  # fmt: skip

    def __init__(self, host: str, now: float, address: Address | None = None, buckets: Buckets | None = None) -> None:
        self.host = host  # shown to others, so not the address
        self.address = address or Address()
        self.stage = Stage.NEW
        self.dialect: Dialect = UNDECIDED  # what it speaks, at the log's write end
        self.opcode = 0  # of the WebSocket messages that it is sent; 0 where there are none
        self.nick = self.user = self.realname = self.away = ""
        self.prefix = ""  # nick!user@host, once registered
        self.modes = ""  # letters of USER_MODES, sorted
        self.monitored: dict[str, str] = {}  # folded nick -> as it was given
        self.authenticated = False  # has given the password, where one is required
        self.negotiating = False  # between CAP LS or REQ and CAP END, registration waits
        self.token = ""  # a hash of the secret by which this client may resume
        self.identity = ""  # once registered: the token, or else a number that no other session has ever had
        self.last_id = "*"  # msgid of what it said last in a channel
        self.batch: MultilineBatch | None = None  # which it has begun to send
        self.sent: dict[DedupKey, StoredMessage] = {}  # its last messages that it may send again
        self.quit_reason = ""  # of a disconnected session
        self.resume_queue: list[Message] = []  # private messages to a disconnected session
        self.channels: dict[Channel, None] = {}
        self.invites: dict[Channel, None] = {}  # channels that an operator invited it to; the last few
        self.nick_bucket = buckets[1] if buckets else TokenBucket(NICK_CHANGES, NICK_CHANGE_S)
        self.connected_at = now + (buckets[0].debit(now, 0) if buckets else 0.0)  # monotonic: when a line of it is read
        self.last_received = now  # monotonic; the reader's
        self.last_spoke = self.signon = time.time()  # Unix seconds
        self.deadline = 0.0  # monotonic: when Hub.tick looks at it next
        self.ping_sent = self.pong_deadline = 0.0  # monotonic
        # The reader's:
        self.flood_bucket = buckets[0] if buckets else None
        self.crlf = False  # its first line ended so
        self.wrong_password = False  # its last line was one
        # The mailer's, at the log's read end:
        self.output: Dialect = UNDECIDED
        self.audiences: tuple[Channel, ...] = ()  # in which it is
        self.send: Callable[[bytes, int], int] = discard  # bytes, flags -> how many were taken

    @property
    def registered(self) -> bool:
        """Whether it has a name that others see."""
        return Stage.REGISTERED <= self.stage <= Stage.DISCONNECTED

    @property
    def answers_ping(self) -> bool:
        return self.dialect.pings or bool(self.opcode)

    def description(self) -> str:
        """The session in the program's log."""
        return f"{self.nick or 'someone without a name'} from {self.address.key or self.host}"


class MultilineBatch:
    """What a client has sent of a message of several lines. After an error, the rest of it is ignored."""

    def __init__(self, first: Message) -> None:
        self.first = first  # BATCH +<reference> draft/multiline <target>
        self.reference, self.target = first.param(0)[1:], first.param(2)
        self.command = ""  # of its lines
        self.lines: list[Line] = []
        self.size = -1  # in bytes; the first line has no line break before it
        self.failed = False

    def check_target(self) -> None:
        """Raises CommandError where it is no batch of this kind, to one recipient."""
        is_valid = self.reference and self.target and "," not in self.target
        self.failed = not is_valid or self.first.param(1) != MULTILINE_CAP
        if self.failed:
            raise CommandError(FAIL_MULTILINE)

    def add(self, message: Message) -> None:
        """Adds a line; raises CommandError."""
        goes_on, text = CONCAT_TAG in message.tags, message.param(1)
        self.command = self.command or message.command
        is_valid = message.command in ("PRIVMSG", "NOTICE") and message.command == self.command
        if not is_valid or len(message.params) < 2 or goes_on and not text:
            raise CommandError(FAIL_MULTILINE)
        if fold(message.param(0)) != fold(self.target):
            raise CommandError(FAIL_MULTILINE_TARGET, self.target, message.param(0))
        self.size += len(text.encode()) + (not goes_on)
        if self.size > MULTILINE_BYTES:
            raise CommandError(FAIL_MULTILINE_BYTES, str(MULTILINE_BYTES))
        if len(self.lines) == MULTILINE_LINES:
            raise CommandError(FAIL_MULTILINE_LINES, str(MULTILINE_LINES))
        self.lines.append(Line(text, goes_on and self.lines != []))

    def whole(self) -> Message:
        """All lines as one message; raises CommandError."""
        if not any(line.text for line in self.lines):
            raise CommandError(FAIL_MULTILINE)
        return join_lines(Message(self.command, (self.target,), tags=self.first.tags), self.lines)


class Ban(NamedTuple):
    mask: str
    by: str
    time: str  # Unix time
    pattern: re.Pattern[str]  # of the folded mask


NEW_MODES = {"n": ""}
CHANNEL_STATE = ("name", "created", "topic", "topic_by", "topic_time", "modes", "closed_after")


class Channel:
    """A channel with members. Guarded by the hub's lock, but for `audience`, which only the mailer uses."""

    def __init__(self, name: str) -> None:
        self.name, self.folded = name, fold(name)
        self.created = int(time.time())
        self.topic = self.topic_by = ""
        self.topic_time = 0
        self.modes = dict(NEW_MODES)  # letter -> parameter, or ''
        self.closed_after = 0  # the last message id before it got a key or was for the invited; 0 where it is not
        self.masks: dict[str, dict[str, Ban]] = {"b": {}, "e": {}, "I": {}}  # lists by their mode, each by folded mask
        # Before a restart: the tokens by which those who could moderate resume, '' without one; who comes again can.
        self.operators: list[str] = []
        self.members: dict[Session, str] = {}  # -> rank: '', 'o', 'v' or 'ov'; at the log's write end
        self.audience: dict[Dialect, dict[Session, None]] = {}  # the same by dialect, at the log's read end
        self._banned: dict[str, bool] = {}  # prefix -> whether a mask matches, as far as that was asked
        self._names: dict[frozenset[str], list[str]] = {}  # of NAMES_CAPS -> texts for 353

    def add(self, session: Session, rank: str = "") -> None:
        """Adds a member. An operator of before a restart is operator; so is the first member where there was none."""
        if self.awaits(session):
            self.operators.remove(session.token)
            rank = rank or "o"
        elif not (self.members or self.operators):
            rank = rank or "o"
        self.members[session] = rank
        session.channels[self] = None
        for caps, texts in self._names.items():
            texts[-1:] = split_text(" ".join([*texts[-1:], self.name_of(session, caps)]), NAMES_BYTES)

    def awaits(self, session: Session) -> bool:
        """Whether a session was operator before a restart."""
        return session.token != "" and session.token in self.operators

    def remove(self, session: Session) -> None:
        del self.members[session], session.channels[self]
        self._names = {}

    def changed(self) -> None:
        """A nick or a rank has changed, on which what is cached here depends."""
        self._names = {}

    def add_mask(self, letter: str, mask: str, by: str, when: str) -> None:
        """Adds to the bans or to a list of exceptions; raises ValueError."""
        self.masks[letter][fold(mask)] = Ban(mask, by, when, mask_pattern(fold(mask)))
        self._banned = {}

    def remove_mask(self, letter: str, mask: str) -> str:
        """Removes from them; returns the mask as it was set."""
        self._banned = {}
        return self.masks[letter].pop(fold(mask)).mask

    def names(self, caps: frozenset[str] = frozenset()) -> list[str]:
        """All names with their signs, in texts that fit in a 353 line. Kept up to date as members join."""
        caps = NAMES_CAPS & caps
        if caps not in self._names:
            items = self.members.items()
            names = [self.name_of(member, caps) if caps or rank else member.nick for member, rank in items]
            self._names[caps] = split_text(" ".join(names), NAMES_BYTES)
        return self._names[caps]

    def name_of(self, member: Session, caps: frozenset[str]) -> str:
        """A member's name in these texts."""
        return signs(self.members[member], caps) + (member.prefix if "userhost-in-names" in caps else member.nick)

    @property
    def logs(self) -> tuple[str, ...]:
        """The names of the logs in which its members may read. What is said goes to the last one.

        While the channel has a key or is for the invited, that is one of its own, which nobody reads afterwards.
        """
        return (self.folded, f"{self.folded} {self.closed_after:x}") if self.closed_after else (self.folded,)

    def close_log(self, ids: MessageIds, reopened: bool) -> None:
        """Begins or ends the log that only members read, as the modes are; others may have come in if `reopened`."""
        closed = "k" in self.modes or "i" in self.modes
        if reopened or not closed:
            self.closed_after = 0
        if closed and not self.closed_after:
            ids.next()  # no two times that a channel is closed begin alike
            self.closed_after = ids.last

    def state(self) -> str:
        """What is restored after a restart: topic, modes, masks, operators; '' where that is what a new channel has."""
        present = [member.token for member, rank in self.members.items() if "o" in rank]
        operators = list(dict.fromkeys(self.operators + present))  # each once, however often there is a restart
        if not (self.topic or any(self.masks.values()) or self.modes != NEW_MODES or operators):
            return ""
        masks = {letter: [ban[:3] for ban in found.values()] for letter, found in self.masks.items()}
        values = {key: getattr(self, key) for key in CHANNEL_STATE}
        return json.dumps({**values, "bans": masks.pop("b"), "exceptions": masks, "operators": operators})

    @staticmethod
    def restored(state: str) -> Channel:
        """A channel without members, from what `state` returned; raises CommandError where that is damaged."""
        try:
            values = json.loads(state)
            channel = Channel(values["name"])
            for key in CHANNEL_STATE:
                setattr(channel, key, values[key])
            for letter, bans in {**values.get("exceptions", {}), "b": values["bans"]}.items():
                for ban in bans:
                    channel.add_mask(letter, *ban)
            channel.operators = list(values.get("operators", ()))
        except (ValueError, LookupError, TypeError):
            raise CommandError(FAIL_MESSAGE_ERROR) from None
        return channel

    def is_banned(self, session: Session) -> bool:
        """Whether a ban matches a session, and no exception. Asked for every message, so the answer is kept."""
        if not self.masks["b"]:
            return False
        if session.prefix not in self._banned:
            if len(self._banned) >= BANS_CACHED:
                self._banned = {}
            self._banned[session.prefix] = self.matches("b", session) and not self.matches("e", session)
        return self._banned[session.prefix]

    def matches(self, letter: str, session: Session) -> bool:
        """Whether a session is in one of the lists of masks."""
        folded = fold(session.prefix)
        return any(ban.pattern.fullmatch(folded) for ban in self.masks[letter].values())

    def mask_checks(self, session: Session) -> int:
        """How many masks have to be looked at when a session joins."""
        return sum(len(self.masks[letter]) for letter in ("I" if session.prefix in self._banned else self.masks))

    def is_hidden(self, session: Session) -> bool:
        """Whether a session may not know who is in the channel, nor that there is one."""
        return "s" in self.modes and session not in self.members


# What a log entry does, in order: messages that others get, and what changes who will get the next ones. The mailer
# alone applies the changes, to `Channel.audience` and to what is the mailer's of a session.


class Broadcast:
    """A message for the members of channels, but for one of them. Encoded once for each dialect."""

    __slots__ = ("_encoded", "channels", "message", "skip")

    def __init__(self, message: Message, channels: tuple[Channel, ...], skip: Session | None) -> None:
        self.message, self.channels, self.skip = message, channels, skip
        self._encoded: dict[Dialect, bytes] | None = None

    def encode(self, dialect: Dialect) -> bytes:
        if self._encoded is None:
            self._encoded = {}
        data = self._encoded.get(dialect)
        if data is None:
            data = self._encoded[dialect] = dialect.encode(self.message)
        return data


class Multicast(NamedTuple):
    sessions: Sequence[Session]
    messages: Sequence[Message | Lines]


class Update(NamedTuple):
    """A session's dialect or channels have changed: what they are from now on."""

    session: Session
    dialect: Dialect
    channels: tuple[Channel, ...]

    def apply(self) -> None:
        """Moves the session from its old audiences to its new ones."""
        session = self.session
        kept = set(session.audiences).intersection(self.channels) if self.dialect is session.output else set()
        for channel in session.audiences:
            if channel not in kept:
                group = channel.audience[session.output]
                del group[session]
                if not group:
                    del channel.audience[session.output]
        session.output, session.audiences = self.dialect, self.channels
        for channel in session.audiences:
            if channel not in kept:
                channel.audience.setdefault(session.output, {})[session] = None


class Close(NamedTuple):
    """A session, or its connection, has ended: that is to be closed after the batch."""

    session: Session


class Redaction(NamedTuple):
    """The first effect of a call that does nothing unless a message can be removed from the history."""

    target: str
    logs: tuple[str, ...]
    number: int
    by: str  # the identity of the author, who alone may; '' where anybody's may be removed


Effect = Union[Broadcast, Multicast, Update, Close, ChannelState, Redaction]


HistoryQuery = Callable[[MemoryHistory], List[Message]]  # run by the mailer, which replies with the result
Reply = Union[Message, Lines, HistoryQuery]


def batch_of(batch: tuple[str, ...], server: str, messages: list[Message]) -> list[Message]:
    """Messages as one batch (IRCv3 batch) of a type with parameters; those in another one already stay there."""
    reference = secrets.token_hex(4)
    inside = [
        message if "batch" in message.tags or message.param(0)[:1] == "-" and message.command == "BATCH"
        else message._replace(tags={**message.tags, "batch": reference})
        for message in messages
    ]  # fmt: skip
    first = Message("BATCH", (f"+{reference}", *batch), server)
    return [first, *inside, Message("BATCH", (f"-{reference}",), server)]


class StoredMessage:
    """A message that has to be stored before anybody gets it. The calls that send it, and send it again, share it."""

    __slots__ = ("by", "key", "log_name", "message", "original", "stored")

    def __init__(self, log_name: str, message: Message, by: str, key: DedupKey | None) -> None:
        self.log_name = log_name  # of a channel, or see private_log; '' for what is not stored
        self.message = message
        self.by = by  # the sender's identity
        self.key = key  # by which a resend is recognised
        self.original: Message | None = None  # which this one repeats, as the history tells
        self.stored: bool | None = None  # whether that worked; None before it was tried


class Call:
    """A command while it runs, and then its entry in the log. Its methods run with the hub's lock held, but for
    reply_error, which the mailer calls, too, and which touches nothing else.

    `effects` is what others get and what changes for the mailer. `replies` is what the caller gets after that: messages
    or queries, which the mailer runs on the history as it is then. Where something in `stored` cannot be stored,
    neither happens, and the caller gets an error. A label (IRCv3 labeled-response) goes onto the replies as a whole.
    """

    __slots__ = ("effects", "hub", "label", "message", "params", "ref", "replies", "session", "stored")

    def __init__(self, hub: Hub, session: Session, message: Message = NO_MESSAGE) -> None:
        self.hub, self.session, self.message, self.params = hub, session, message, message.params
        self.effects: list[Effect] = []
        self.replies: list[Reply] = []
        self.stored: tuple[StoredMessage, ...] = ()
        self.label = self.ref = ""  # ref: a label of a client without batches goes onto receipts and errors only
        if "label" in message.tags and "labeled-response" in session.dialect.caps:
            if "batch" not in session.dialect.caps:
                self.ref = message.tags["label"]
                if session.token and session.dialect.single:  # JSON: it is the message's id, too
                    self.message = message._replace(tags={**message.tags, ID_TAG: self.ref})
            elif len(message.tags["label"].encode()) <= LABEL_BYTES:
                self.label = message.tags["label"]

    # What the caller gets.

    def reply(self, numeric: Numeric, *params: str) -> None:
        """Replies with a numeric, its parameters, and its text filled from them, if it has one."""
        words = (*params, numeric.text.format(*params)) if numeric.text else params
        self.replies.append(Message(numeric.code, (self.session.nick or "*", *words), self.hub.name))

    def reply_lines(self, numeric: Numeric, *params: str, texts: list[str]) -> None:
        """Replies with a numeric for each of some texts, of which there is at least one."""
        message = Message(numeric.code, (self.session.nick, *params), self.hub.name)
        self.replies.append(Lines(message, tuple(texts)))
        self.hub.log_length += len(texts)
        self.session.address.rows.debit(time.monotonic(), len(texts))

    def reply_error(self, error: CommandError) -> None:
        """Replies with an error."""
        params = [safe_param(param) for param in error.params]
        numeric, nick = error.numeric, self.session.nick or "*"
        words: tuple[str, ...] = (nick, *params, numeric.text.format(*params))
        if numeric.code == "FAIL":  # IRCv3 standard-replies: FAIL <command> <code> {<context>} :<text>
            context = () if "{0}" in numeric.text else params  # what the text does not tell
            text = cut(numeric.text.format(*error.params), TOPIC_BYTES)
            words = (self.message.command or "*", numeric.name.upper().replace("-", "_"), *context, text)
        self.replies.append(Message(numeric.code, words, self.hub.name, {"label": self.ref} if self.ref else NO_TAGS))

    def query(self, run: HistoryQuery, weight: int, *batch: str) -> None:
        """Replies with what the history answers, about `weight` messages, in a batch if the caller knows batches."""
        is_batch = batch and "batch" in self.session.dialect.caps
        self.replies.append((lambda history: batch_of(batch, self.hub.name, run(history))) if is_batch else run)
        self.hub.log_length += weight
        self.session.address.rows.debit(time.monotonic(), weight)

    def acknowledge(self, relayed: Message) -> None:
        """Tells a sender that its message was accepted, by its echo or an ACK. With a label, no echo makes an ACK."""
        caps = self.session.dialect.caps
        if "echo-message" in caps and CAPS_NEEDED.get(relayed.command, "echo-message") in caps:
            self.replies.append(relayed._replace(tags={**relayed.tags, "label": self.ref}) if self.ref else relayed)
        elif self.ref:
            tags = {"time": relayed.tags["time"], "msgid": relayed.tags["msgid"], "label": self.ref}
            self.replies.append(Message("ACK", (), self.hub.name, tags))

    # What others get.

    def tags(self) -> dict[str, str]:
        """The tags of a message from the caller."""
        return {**self.hub.ids.next(), "bot": ""} if "B" in self.session.modes else self.hub.ids.next()

    def send_to(self, session: Session, message: Message) -> None:
        """Sends a message to one session, unless that would break its TLS handshake."""
        if session.stage == Stage.HANDSHAKING:
            return
        if session is self.session:
            self.replies.append(message)
        else:
            self.effects.append(Multicast([session], [message]))

    def broadcast(self, message: Message, *channels: Channel, echo: bool = True) -> None:
        """Sends a message to all members of channels, once to each; to the caller only with `echo`."""
        if self.label and echo and any(self.session in channel.members for channel in channels):
            self.replies.append(message)
            echo = False
        self.effects.append(Broadcast(message, channels, None if echo else self.session))
        self.hub.log_broadcasts += 1

    # What changes.

    def set_online(self, session: Session, online: bool) -> None:
        """A nick has come into use, or is no longer, which WHOWAS remembers: tells those who monitor it."""
        if not online:
            row = session.nick, session.user, session.host, "*", session.realname
            self.hub.gone.appendleft((row, time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())))
        told = session.prefix if online else session.nick
        message = Message((RPL_MONONLINE if online else RPL_MONOFFLINE).code, ("*", told), self.hub.name)
        watchers = list(self.hub.monitors.get(fold(session.nick), ()))
        if watchers:
            self.effects.append(Multicast(watchers, [message]))

    def set_dialect(self, dialect: Dialect) -> None:
        """Changes what the caller speaks, or has negotiated."""
        self.session.dialect = dialect
        self._update(self.session)

    def join(self, channel: Channel, rank: str = "") -> None:
        """Adds the caller to a channel. Tells nobody."""
        self.hub.channels[channel.folded] = channel
        channel.add(self.session, rank)
        if "o" in channel.members[self.session]:
            self.save(channel)
        self._update(self.session)

    def leave(self, session: Session, *channels: Channel) -> None:
        """Removes a session from channels. Tells nobody."""
        for channel in channels:
            moderated = "o" in channel.members[session]
            channel.remove(session)
            if channel.members:
                if moderated:
                    self.save(channel)
                continue
            del self.hub.channels[channel.folded]
            channel.operators = channel.operators if time.time() < self.hub.started + OPERATORS_S else []
            self.save(channel, reopened=True)
            if channel.operators:
                self.hub.restored[channel.folded] = channel.state()
        self._update(session)

    def save(self, channel: Channel, reopened: bool = False) -> None:
        """Has what a restart keeps of a channel stored: nothing once it has no members, and waits for none.

        With `reopened`, others may come in than those for whom it was closed: see Channel.logs.
        """
        channel.close_log(self.hub.ids, reopened)
        kept = channel.members or channel.operators
        self.effects.append(ChannelState(channel.folded, channel.state() if kept else ""))

    def _update(self, session: Session) -> None:
        dialect = framed(session.dialect, session.opcode) if session.opcode else session.dialect
        self.effects.append(Update(session, dialect, tuple(session.channels)))

    def part(self, session: Session, channel: Channel, reason: str) -> None:
        """Removes a session from a channel, which the caller did, and tells its members."""
        kicked = [] if session is self.session and self.message.command != "KICK" else [session.nick]
        words = (channel.name, *kicked, *([reason] if reason else []))
        message = Message("KICK" if kicked else "PART", words, self.session.prefix, self.tags())
        self.broadcast(message, channel)
        self.leave(session, channel)

    def quit(self, session: Session, reason: str, farewell: str) -> None:
        """Ends a session: the others see `reason`, itself gets `farewell`, if any, as its last line.

        There always is a reason, as RFC 1459, section 4.1.6, demands.
        """
        if session.stage == Stage.GONE:
            return
        reason = reason or farewell or CONNECTION_CLOSED
        level = logging.INFO if session.registered else logging.DEBUG
        log_later(level, "%s left: %s", session.description(), escape_controls(reason).rstrip(": "))
        channels = tuple(session.channels)
        if session.registered:
            self.set_online(session, False)
        if channels:
            self.leave(session, *channels)
            message = Message("QUIT", (cut(reason, REASON_BYTES),), session.prefix, self.hub.ids.next())
            self.broadcast(message, *channels)
        if farewell:
            self.send_to(session, Message("ERROR", (farewell,)))
        self.forget(session)

    def forget(self, session: Session) -> None:
        """Removes a session from the hub; its connection is closed once the log is sent."""
        self.hub.disconnected -= session.stage == Stage.DISCONNECTED
        self.hub.registered -= session.registered
        self.hub.invisible -= "i" in session.modes
        self.hub.unmonitor(session, session.monitored)
        session.address.disconnected.pop(session, None)
        session.stage = Stage.GONE
        del self.hub.sessions[session]
        if session.sent:
            self.hub.sent_before.pop(session.token, None)
            self.hub.sent_before[session.token] = session.sent
            if len(self.hub.sent_before) > MAX_RESUMABLE:
                del self.hub.sent_before[next(iter(self.hub.sent_before))]
        if self.hub.nicks.get(fold(session.nick)) is session:
            del self.hub.nicks[fold(session.nick)]
        self.effects.append(Close(session))
        if session is self.session:
            self.label = ""  # its last line is the ERROR

    def ping(self, session: Session, now: float, patience: float) -> None:
        """Sends a PING, which must be answered within `patience` seconds."""
        session.ping_sent, session.pong_deadline = now, now + patience
        self.send_to(session, Message("PING", (self.hub.name,)))
        self.hub.set_deadline(session, session.pong_deadline)


class Turnstile:
    """Lets threads wait until something holds, and then through one after another, lest a thousand wake at once.

    To be used with the lock held, which is released while a thread waits.
    """

    def __init__(self, lock: threading.Lock, is_open: Callable[[], bool]) -> None:
        self._condition, self._is_open = threading.Condition(lock), is_open
        self.wake = self._condition.notify  # one that waits: it may be open

    def wait(self) -> None:
        """Waits until it is open, and wakes the next one."""
        if not self._is_open():
            self._condition.wait_for(self._is_open)
            self.wake()


class Hub:
    """Who is here, who is where, and the log of what is to be delivered.

    `with hub:` holds the lock, and afterwards wakes the mailer if the log has grown. What has no other owner named is
    guarded by the lock.
    """

    def __init__(
        self, name: str, history: MemoryHistory | None = None, replay: int = REPLAY_LINES, limits: Limits | None = None
    ) -> None:
        self.name = name
        self.history = history or MemoryHistory()  # the mailer's
        self.private = MemoryHistory()  # of private_log; the mailer's
        self.storage_error = ""  # why the last message could not be stored; the mailer's
        self.unsaved: dict[str, ChannelState] = {}  # folded name -> what could not be stored; the mailer's
        self.replay = replay  # lines that newcomers get
        self.limits = limits or Limits()
        self.access = AccessControl()
        self.ids = MessageIds(self.history.last_sequence())
        self.sent_before: dict[str, dict[DedupKey, StoredMessage]] = {}  # token -> Session.sent of one that is gone
        self.started = time.time()
        self.messages = 0  # said so far
        self.sessions: dict[Session, None] = {}  # all but those that are gone, in order of arrival
        self.disconnected = self.invisible = 0  # how many of them are so
        self.registered = self.most_registered = 0  # now, and at most
        self.nicks: dict[str, Session] = {}  # folded nick -> who holds it
        self.monitors: dict[str, dict[Session, None]] = {}  # folded nick -> who is told when it comes and goes
        self.gone: collections.deque[tuple[tuple[str, ...], str]] = collections.deque(maxlen=MAX_GONE)  # the last first
        self.channels: dict[str, Channel] = {}  # folded name -> a channel that has members
        self.history.in_use = self._is_readable
        # folded name -> Channel.state of one from before the restart, into which nobody has come back
        self.restored = self.history.states()
        self.guests = itertools.count(1)  # numbers for those who bring no name
        self._deadlines: list[tuple[float, int, Session]] = []  # a heap of (deadline, tie-break, session)
        self._ties = itertools.count()
        self.log_broadcasts = 0  # in the log
        self.log_length = 0  # calls, effects and replies in the log
        self.wake: Callable[[], None] = lambda: None  # wakes the mailer
        self._lock = threading.Lock()
        self.not_full = Turnstile(self._lock, self._is_not_full)  # for commands, where the log is
        self.idle = Turnstile(self._lock, self._is_idle)  # for queries, where it is
        self.log_queries = 0  # in the log: one at a time, so that others need not wait for many
        self.closed = False  # nobody takes the log any more
        self._mailer_waits = False
        self._log: list[Call] = []

    def __enter__(self) -> Hub:
        self._lock.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        wake = self._mailer_waits and bool(self._log)
        if wake:
            self._mailer_waits = False
        self._lock.release()
        if wake:
            self.wake()

    def _is_not_full(self) -> bool:
        return self.log_broadcasts < LOG_HIGH_WATER and self.log_length < LOG_ENTRIES or self.closed

    def _is_idle(self) -> bool:
        return not self.log_queries and self.log_length < QUERY_ENTRIES or self.closed

    def _is_readable(self, log_name: str) -> bool:
        channel = self.channels.get(log_name.partition(" ")[0])
        return channel is not None and log_name in channel.logs

    # For the server's threads, without the lock.

    def add(self, session: Session, silence: float) -> None:
        """A client has connected; it is prompted after so many seconds of silence."""
        with self:
            self.sessions[session] = None
            self.set_deadline(session, session.connected_at + silence)

    def set_stage(self, session: Session, stage: int, before: int) -> None:
        """Changes a session's stage, if that is `before`."""
        with self:
            if session.stage == before:
                session.stage = stage
                if stage == Stage.NEW:
                    self.set_deadline(session, time.monotonic() + PROMPT_S)

    def disconnect(self, session: Session, reason: str, farewell: str = "") -> None:
        """A connection has ended. A client that may resume is gone only later; without a `farewell`, which says why."""
        with self:
            if session.stage == Stage.DISCONNECTED:
                return
            call, may_resume = Call(self, session), session.token and session.registered and not farewell
            if may_resume and self.disconnected >= MAX_RESUMABLE:
                end_disconnected(self, self.access.oldest_disconnected())
            if may_resume and self.disconnected < MAX_RESUMABLE:
                self.disconnected += 1
                session.stage, session.quit_reason = Stage.DISCONNECTED, reason or "Connection lost"
                self.set_deadline(session, time.monotonic() + RESUME_GRACE_S)
                call.effects.append(Close(session))
            else:
                call.quit(session, reason, farewell)
            self.append(call)

    def close(self, reason: str) -> None:
        """Tells everybody that the server ends, and lets nobody stay."""
        with self:
            for session in list(self.sessions):
                call = Call(self, session)
                call.send_to(session, Message("ERROR", (reason,)))
                call.forget(session)
                self.append(call)

    def tick(self) -> float:
        """Does what is due: prompts, pings, timeouts. Returns the seconds until it should be called again."""
        now = time.monotonic()
        with self:
            while self._deadlines and self._deadlines[0][0] <= now:
                deadline, _, session = heapq.heappop(self._deadlines)
                if deadline == session.deadline and session.stage != Stage.GONE:
                    call = Call(self, session)
                    self.set_deadline(session, check_timeouts(call, now))
                    self.append(call)
            return min(max(self._deadlines[0][0] - now, 0.01), TICK_S) if self._deadlines else TICK_S

    def drain_log(self) -> list[Call]:
        """The whole log. When it is empty, the next entry wakes the mailer. Mailer only."""
        with self._lock:
            calls, self._log = self._log, []
            self.log_broadcasts = self.log_length = self.log_queries = 0
            self.not_full.wake()
            self.idle.wake()
            self._mailer_waits = not calls
            return calls

    # With the lock held.

    def set_deadline(self, session: Session, deadline: float) -> None:
        """Lets `tick` look at a session at a monotonic time, instead of any that was set before."""
        session.deadline = deadline
        heapq.heappush(self._deadlines, (deadline, next(self._ties), session))

    def monitor(self, session: Session, names: Mapping[str, str]) -> None:
        """Adds folded nicks, with what was given, to those that a session monitors, as many as there may be."""
        for folded, name in names.items():
            if len(session.monitored) < MAX_MONITORED:
                session.monitored.setdefault(folded, name)
                self.monitors.setdefault(folded, {})[session] = None

    def unmonitor(self, session: Session, names: Iterable[str]) -> None:
        """Removes folded nicks from those that a session monitors."""
        for name in list(names):
            if session.monitored.pop(name, None):
                del self.monitors[name][session]
                if not self.monitors[name]:
                    del self.monitors[name]

    def append(self, call: Call) -> None:
        """Appends a call to the log, if it does anything."""
        if call.effects or call.replies or call.label or call.stored:
            self._log.append(call)
            self.log_length += 1 + len(call.effects) + len(call.replies)

    def pause(self) -> None:
        """Lets others have the lock, and waits until there is time for queries."""
        self.__exit__()
        time.sleep(PAUSE_S)  # without that, this thread would be the next one to have it, too
        self.__enter__()
        self.idle.wait()
        self.log_queries += 1


def check_timeouts(call: Call, now: float) -> float:
    """Prompts, pings or ends the caller, whose deadline has passed; returns its next one."""
    session, limits = call.session, call.hub.limits
    if session.stage == Stage.DISCONNECTED:
        call.quit(session, session.quit_reason, "")
        return now
    if not session.registered:
        # Browsers connect in advance, and take no prompt for an answer.
        spare = session.stage == Stage.NEW and session.address.key in call.hub.access.browsers
        if now >= session.connected_at + limits.register_s:
            lacking = "password" if isinstance(session.dialect, PlainPassword) else "name"
            call.quit(session, "", "" if spare else f"No {lacking} within {limits.register_s:.0f} seconds")
        elif session.stage == Stage.NEW and not spare:
            session.stage = Stage.PROMPTED
            call.send_to(session, PROMPT)
        return session.connected_at + limits.register_s
    silence = min(limits.ping_s, WEB_PING_S) if session.opcode else limits.ping_s
    if session.last_received < session.ping_sent:
        if now >= session.pong_deadline:
            call.quit(session, "Ping timeout", "Ping timeout")
        return min(session.pong_deadline, now + silence)
    if not session.answers_ping:
        return now + limits.ping_s  # nothing to ask: TCP itself finds out
    if now >= session.last_received + silence:
        call.ping(session, now, limits.pong_s)
        return min(session.pong_deadline, now + silence)
    return session.last_received + silence


def end_disconnected(hub: Hub, session: Session | None) -> None:
    """Ends a session whose client has not come back, if there is one."""
    if session:
        call = Call(hub, session)
        call.quit(session, session.quit_reason, "")
        hub.append(call)


def make_room(hub: Hub, address: Address) -> None:
    """Ends a disconnected session where somebody has come who does not resume it: both count, for an address and in
    all."""
    surplus = None
    if not address.exempt and address.connections + len(address.disconnected) > hub.limits.per_address:
        surplus = next(iter(address.disconnected), None)
    if not surplus and len(hub.sessions) > hub.limits.clients:
        surplus = hub.access.oldest_disconnected()
    end_disconnected(hub, surplus)


def ping_ghost(call: Call, session: Session) -> None:
    """Finds out whether the holder of a name, which the caller asks for, is still there."""
    now = time.monotonic()
    asked = session.last_received < session.ping_sent
    quiet = now > session.last_received + GHOST_PING_S
    if session.answers_ping and not asked and session.stage == Stage.REGISTERED and quiet:
        call.ping(session, now, GHOST_PING_S)


# -----------------------------------------------------------------------------
# commands
# -----------------------------------------------------------------------------
# Each function is one command, headed by its grammar. It runs with the hub's lock held, and does everything by the
# methods of its Call; functions above the first command are the dispatcher's, and what commands share.

Rows = Iterable[Tuple[Any, ...]]  # (numeric, *parameters), or () for what was looked at and is not told
Handler = Callable[[Call], Optional[Rows]]  # a query returns its replies
AnyHandler = TypeVar("AnyHandler", bound=Handler)


class Command(NamedTuple):
    run: Handler
    min_params: int
    early: bool  # allowed before registration
    grammar: str


COMMANDS: dict[str, Command] = {}


def command(grammar: str, min_params: int = 0, early: bool = False) -> Callable[[AnyHandler], AnyHandler]:
    """Enters a function in the table, under the first word of its grammar."""

    def enter(run: AnyHandler) -> AnyHandler:
        COMMANDS[grammar.split()[0]] = Command(run, min_params, early, grammar)
        return run

    return enter


def check_query_rate(call: Call) -> None:
    """Waits until there is time for a query; raises CommandError where its address has had too many rows of answers."""
    call.hub.idle.wait()
    call.hub.log_queries += 1
    address = call.session.address
    if not address.exempt and address.rows.is_empty(time.monotonic()):
        raise CommandError(RPL_TRYAGAIN, call.message.command)


def send_rows(call: Call, rows: Rows) -> None:
    """Replies with rows. Between two parts of a long answer, lets others have the lock; the caller may leave then."""
    check_query_rate(call)
    for count, row in enumerate(rows, 1):
        if row:
            call.reply(*row)
        if count % QUERY_ROWS == 0:
            part = Call(call.hub, call.session)
            if not call.label:  # otherwise they go out as one
                part.replies, call.replies = call.replies, []
                call.hub.append(part)
            call.session.address.rows.debit(time.monotonic(), max(len(part.replies), QUERY_ROWS / 10))
            call.hub.pause()
            if call.session.stage == Stage.GONE:
                return
    call.session.address.rows.debit(time.monotonic(), len(call.replies))


def handle_line(hub: Hub, session: Session, line: bytes | None) -> None:
    """Runs the commands in a line; None stands for one that was too long. In the session's reader, without the lock."""
    if session.dialect in (UNDECIDED, UNDECIDED_WEB):
        line = begin(hub, session, line)
    error: CommandError | None = None
    messages: list[Message] = []
    try:
        if line is None:
            raise CommandError(ERR_INPUTTOOLONG)
        messages = session.dialect.decode(line, session.registered)
    except CommandError as caught:
        error = caught
        time.sleep(ERROR_PAUSE_S)
    with hub:
        hub.not_full.wait()
        if error and session.stage != Stage.GONE:
            call = Call(hub, session, error.message or NO_MESSAGE)
            call.reply_error(error)
            hub.append(call)
        dispatch_all(hub, session, messages)
    if session.wrong_password:
        session.wrong_password = False
        time.sleep(WRONG_PAUSE_S)


def begin(hub: Hub, session: Session, line: bytes | None) -> bytes | None:
    """Decides by the first line which dialect a session speaks. Returns the line without a byte-order mark."""
    if line and line.startswith(codecs.BOM_UTF8):
        line = line[len(codecs.BOM_UTF8) :]
        if not line:
            return line
    with hub:
        call = Call(hub, session)
        call.set_dialect(dialect_of(line or b"", "\r\n" if session.crlf else "\n", bool(session.opcode)))
        if isinstance(session.dialect, Http):
            hub.access.add_browser(session.address)
        if session.stage == Stage.PROMPTED:
            call.send_to(session, PROMPT_END)
        if session.stage != Stage.GONE:
            session.stage = Stage.REGISTERING
            hub.append(call)
    if line is None:  # perhaps a browser's, where the page of somebody else has written what would come next
        hub.disconnect(session, "", ERR_INPUTTOOLONG.text)
    return line


def send_raw(hub: Hub, session: Session, data: bytes, ends: bool = False) -> None:
    """Sends bytes that no dialect knows of, and may end the connection. In the session's reader, without the lock."""
    with hub:
        hub.not_full.wait()
        if session.stage != Stage.GONE:
            call = Call(hub, session)
            call.send_to(session, Message("RAW", (data.decode("latin-1"),)))
            hub.append(call)
    if ends:
        hub.disconnect(session, "")


def dispatch_all(hub: Hub, session: Session, messages: list[Message]) -> None:
    """Runs commands up to the first error. A plain user who gives a name is asked for the password, if there is one."""
    asks = type(session.dialect) is Plain and len(messages) > 1
    if asks and hub.access.password_required and not session.authenticated:
        call = Call(hub, session)
        call.set_dialect(PlainPassword(session.dialect.end, messages[0].param(0)))
        call.send_to(session, PASSWORD_PROMPT)
        hub.append(call)
        return
    for message in messages:
        if session.stage == Stage.GONE or not dispatch(hub, session, message):
            return


def dispatch(hub: Hub, session: Session, message: Message) -> bool:
    """Runs one command and appends its call to the log; False when it ended with an error."""
    call, done = Call(hub, session, message), False
    try:
        in_batch = (session.batch or "batch" in message.tags) and is_in_batch(session, message)
        row = COMMANDS.get("BATCH" if in_batch else message.command)
        if row is None:
            raise CommandError(ERR_UNKNOWNCOMMAND, message.command)
        if not row.early and session.stage < Stage.REGISTERED:
            raise CommandError(ERR_NOTREGISTERED)
        if len(message.params) < row.min_params:
            raise CommandError(ERR_NEEDMOREPARAMS, message.command)
        rows = row.run(call)
        if rows is not None:
            servers = message.params[-1:] if row.grammar.endswith("[<server>]") else ()
            if any(not search_pattern(mask).fullmatch(fold(hub.name)) for mask in servers):
                raise CommandError(ERR_NOSUCHSERVER, *servers)
            send_rows(call, rows)
        done = True
    except CommandError as error:
        call.reply_error(error)
        if error.farewell:
            call.quit(session, "", error.farewell)
    charge(call)
    hub.append(call)
    return done


def is_in_batch(session: Session, message: Message) -> bool:
    """Whether a message can only be a line of a multiline batch, or comes where such a line should."""
    if "batch" in message.tags and MULTILINE_CAP in session.dialect.caps:
        return True
    is_open = session.batch is not None and not session.batch.failed
    return is_open and message.command not in ("PING", "PONG", "QUIT")


def charge(call: Call) -> None:
    """Takes a token of the caller's rate limit for each message that others receive by one line, beyond the first."""
    session, bucket = call.session, call.session.flood_bucket
    if not bucket or len(call.effects) < 2:
        return
    heard = sum(
        isinstance(effect, Multicast)
        or isinstance(effect, Broadcast)
        and any(len(channel.members) > (session in channel.members) for channel in effect.channels)
        for effect in call.effects
    )
    if heard > 1:
        bucket.debit(time.monotonic(), heard - 1)


def targets(call: Call, text: str) -> list[str]:
    """The items of a comma-separated parameter, each once, however it is spelt."""
    if "," not in text:
        return [text]
    found: dict[str, str] = {}
    for item in text.split(","):
        here = item == CURRENT_CHANNEL and call.session.dialect.single and next(iter(call.session.channels), None)
        found.setdefault(here.folded if here else fold(item), item)
    return list(found.values())


def for_each_target(call: Call, act: Callable[[str], None], index: int = 0, most: int = MAX_TARGETS) -> None:
    """Calls `act` for every item of a comma-separated parameter, at most `most`. An error in one does not stop the
    others."""
    items = targets(call, call.message.param(index))
    if len(items) > most:
        raise CommandError(ERR_TOOMANYTARGETS)
    for item in items:
        try:
            act(item)
        except CommandError as error:
            call.reply_error(error)


def find_channel(call: Call, name: str) -> Channel:
    """The channel of a name; raises CommandError."""
    if name == CURRENT_CHANNEL and call.session.dialect.single:
        if call.session.channels:
            return next(iter(call.session.channels))
        raise CommandError(ERR_NOWHERE, name)
    channel = call.hub.channels.get(fold(name))
    if channel is None:
        raise CommandError(ERR_NOSUCHCHANNEL, name)
    return channel


def is_visible(call: Call, other: Session) -> bool:
    """Whether the caller sees another session in lists, as it does itself and those in its channels in any case."""
    mine = call.session.channels.keys()
    return "i" not in other.modes or other is call.session or not mine.isdisjoint(other.channels)


def find_user(call: Call, nick: str) -> Session:
    """The registered session with a nick; raises CommandError."""
    session = call.hub.nicks.get(fold(nick))
    if session is None or not session.registered:
        raise CommandError(ERR_NOSUCHNICK, nick)
    return session


def find_member(call: Call, channel: Channel, nick: str) -> Session:
    """The member of a channel with a nick; raises CommandError."""
    session = find_user(call, nick)
    if session not in channel.members:
        raise CommandError(ERR_USERNOTINCHANNEL, session.nick, channel.name)
    return session


def check_member(call: Call, channel: Channel, rank: str = "") -> None:
    """Raises CommandError if the caller is not in the channel or lacks the rank."""
    if call.session not in channel.members:
        raise CommandError(ERR_NOTONCHANNEL, channel.name)
    if rank not in channel.members[call.session]:
        raise CommandError(ERR_CHANOPRIVSNEEDED, channel.name)


def notify_peers(call: Call, message: Message, cap: str) -> None:
    """Tells a change to those who share a channel with the caller, if they have negotiated a capability. Raises
    CommandError for too many changes."""
    if not call.session.nick_bucket.allow(time.monotonic()):
        raise CommandError(RPL_TRYAGAIN, call.message.command)
    if call.session.channels:
        told = message._replace(tags={**message.tags, FOR_TAG: cap})
        call.broadcast(told, *call.session.channels, echo=False)
    caps, mine = {"extended-monitor", cap}, call.session.channels.keys()
    watchers = [x for x in call.hub.monitors.get(fold(call.session.nick), ()) if x.dialect.caps >= caps]
    watchers = [x for x in watchers if x is not call.session and mine.isdisjoint(x.channels)]
    if watchers:
        call.effects.append(Multicast(watchers, [message]))


# Registration.


@command("CAP LS [302] | LIST | REQ :<capability>{ <capability>} | END", 1, early=True)
def cap(call: Call) -> None:
    session, sub = call.session, call.params[0].upper()
    if sub == "END":
        session.negotiating = False
        register(call)
        return
    if sub not in ("LS", "LIST", "REQ"):
        raise CommandError(ERR_INVALIDCAPCMD, sub)
    session.negotiating = not session.registered and (sub != "LIST" or session.negotiating)
    caps = session.dialect.caps
    if sub == "LS" and call.message.param(1).isdecimal() and int(call.message.param(1)) >= 302:
        caps |= {"cap-notify"}  # IRCv3 cap-notify: implied
    values = CAP_VALUES if "cap-notify" in caps else {}
    answer, text = sub, " ".join(name + values.get(name, "") for name in CAPABILITIES)
    if sub == "LIST":
        text = " ".join(sorted(caps))
    if sub == "REQ":
        text = call.message.param(1)
        names = text.split()
        known = all(name.lstrip("-") in CAPABILITIES for name in names)
        check_length(Message("CAP", (session.nick or "*", "NAK", text), call.hub.name))
        answer = "ACK" if known else "NAK"
        if known:
            dropped = {name[1:] for name in names if name[0] == "-"} - {"cap-notify"}
            caps = (caps | {name for name in names if name[0] != "-"}) - dropped
    if caps != session.dialect.caps:
        call.set_dialect(irc(caps))
    call.send_to(session, Message("CAP", (session.nick or "*", answer, text), call.hub.name))


@command("PASS <password>", 1, early=True)
def pass_(call: Call) -> None:
    hub, session = call.hub, call.session
    if session.registered:
        raise CommandError(ERR_ALREADYREGISTERED)
    if not hub.access.password_required or session.authenticated:
        return
    session.authenticated = hub.access.check_password(session.address, call.params[0])
    if not session.authenticated:
        session.wrong_password = True
        log_later(logging.WARNING, "wrong password from %s", session.address.key)
        raise password_error(session)
    if isinstance(session.dialect, PlainPassword):
        call.set_dialect(plain(session.dialect.end))


def password_error(session: Session) -> CommandError:
    """A wrong or missing password. Plain and JSON clients may try again; IRC clients are disconnected."""
    farewell = "" if session.dialect.single else "Wrong password"
    farewell = "Too many wrong passwords; try again later" if session.address.locked_out() else farewell
    return CommandError(ERR_PASSWDMISMATCH if session.wrong_password else ERR_NO_PASSWORD, farewell=farewell)


def check_admitted(call: Call) -> None:
    """Raises CommandError if the caller, who asks for a nick, has not given the password, or the nick is banned."""
    if call.hub.access.password_required and not call.session.authenticated:
        raise password_error(call.session)
    if fold(call.message.param(0)) in call.hub.access.banned:
        raise CommandError(ERR_YOUREBANNEDCREEP, farewell="You are banned from this server")


@command("NICK <name>", early=True)
def nick(call: Call) -> None:
    check_admitted(call)
    change_nick(call, call.message.param(0))


@command("GUEST", early=True)
def guest(call: Call) -> None:
    """The server chooses a name; what a JSON join without a user stands for."""
    if call.session.registered:
        raise CommandError(ERR_ALREADYREGISTERED)
    check_admitted(call)
    change_nick(call, next(name for name in map("guest{}".format, call.hub.guests) if name not in call.hub.nicks))


def change_nick(call: Call, name: str) -> None:
    """Takes a nick, if nobody else has it, and registers when all else has been said."""
    hub, session = call.hub, call.session
    if not name:
        raise CommandError(ERR_NONICKNAMEGIVEN)
    name = check_nick(name)
    holder = hub.nicks.get(fold(name), session)
    resumes = session.token and holder.token == session.token and not session.registered
    if holder is not session and not resumes:
        ping_ghost(call, holder)
        raise CommandError(ERR_NICKNAMEINUSE, name)
    if name == session.nick:
        return
    if session.registered and not session.nick_bucket.allow(time.monotonic()):
        raise CommandError(ERR_NICKTOOFAST, name)
    if hub.nicks.get(fold(session.nick)) is session:
        del hub.nicks[fold(session.nick)]
    if not resumes or holder is session:
        hub.nicks[fold(name)] = session
    rename(call, name)
    register(call)


def rename(call: Call, name: str) -> None:
    """Gives the caller another nick, and tells those who see it."""
    session = call.session
    is_other = session.registered and fold(name) != fold(session.nick)
    if is_other:
        call.set_online(session, False)
    if session.registered:
        change = Message("NICK", (name,), session.prefix, call.tags())
        if session.channels:
            call.broadcast(change, *session.channels)
        else:
            call.send_to(session, change)
    session.nick = name
    session.prefix = f"{name}!{session.user}@{session.host}"
    for channel in session.channels:
        channel.changed()
    if is_other:
        call.set_online(session, True)


def resume_session(call: Call, old: Session) -> None:
    """Resumes a client's old session on its new connection: channels, ranks, pending messages. Others see nothing."""
    session = call.session
    for channel, rank in [(channel, channel.members[old]) for channel in old.channels]:
        call.join(channel, rank)
        call.leave(old, channel)
    session.resume_queue, session.away, session.invites = old.resume_queue, old.away, old.invites
    session.nick_bucket, old.nick_bucket = old.nick_bucket, session.nick_bucket
    session.modes, old.modes = old.modes, session.modes
    if session.flood_bucket and old.flood_bucket:
        session.flood_bucket, old.flood_bucket = old.flood_bucket, session.flood_bucket
    session.sent, old.sent = old.sent or session.sent, {}
    session.last_id = old.last_id
    call.send_to(old, Message("ERROR", (RESUMED_ELSEWHERE,)))
    call.forget(old)


@command("USER <user> <mode> <unused> :<real name>", 4, early=True)
def user(call: Call) -> None:
    session = call.session
    if session.registered:
        raise CommandError(ERR_ALREADYREGISTERED)
    if not call.params[3]:
        raise CommandError(ERR_NEEDMOREPARAMS, "USER")
    session.user = re.sub("[^A-Za-z0-9._-]", "", call.params[0])[:USER_CHARS] or "user"
    session.realname = cut(call.params[3], REALNAME_BYTES)
    session.prefix = f"{session.nick}!{session.user}@{session.host}"
    register(call)


def register(call: Call) -> None:
    """Registers and welcomes a session that has said all it must."""
    hub, session = call.hub, call.session
    if session.registered or session.negotiating or not session.nick or not session.user:
        return
    holder = hub.nicks.get(fold(session.nick), session)
    if holder is not session and holder.token != session.token:
        name, session.nick = session.nick, ""
        raise CommandError(ERR_NICKNAMEINUSE, name)
    if holder is not session:
        resume_session(call, holder)
    else:
        make_room(hub, session.address)
        call.set_online(session, True)
    hub.nicks[fold(session.nick)] = session
    session.stage = Stage.REGISTERED
    session.identity = session.token or hub.ids.next()["msgid"]
    hub.registered += 1
    hub.most_registered = max(hub.most_registered, hub.registered)
    session.signon = session.last_spoke = time.time()
    log_later(logging.INFO, "%s joined", session.description())
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(hub.started))
    call.reply(RPL_WELCOME, f"Welcome to the chat, {session.prefix}")
    call.reply(RPL_YOURHOST, f"Your host is {hub.name}, running {VERSION}")
    call.reply(RPL_CREATED, f"This server was started {started}")
    call.reply(RPL_MYINFO, hub.name, VERSION, USER_MODES, "CIbeiklmnostv")
    for row in (*ISUPPORT, *lusers(call), *motd(call)):
        call.reply(*row)
    for channel in session.channels:  # of a resumed session
        call.send_to(session, join_message(session, channel, NO_TAGS))
        send_channel_info(call, channel)
    call.replies += session.resume_queue
    session.resume_queue = []


_TOKENS = (
    "NETWORK=chat.py CASEMAPPING=ascii CHANTYPES=# PREFIX=(ov)@+ CHANMODES=beI,k,l,Cimnst EXCEPTS=e INVEX=I"
    f" NICKLEN={NICK_CHARS} CHANNELLEN={CHANNEL_CHARS} TOPICLEN={TOPIC_BYTES} AWAYLEN={AWAY_BYTES}"
    f" KICKLEN={REASON_BYTES} KEYLEN={KEY_BYTES} NAMELEN={REALNAME_BYTES} MODES={MAX_MODES} MAXLIST=beI:{MAX_BANS}"
    f" TARGMAX=JOIN:{MAX_JOINS},PART:{MAX_JOINS},KICK:{MAX_TARGETS},NAMES:{MAX_TARGETS},NOTICE:{MAX_TARGETS},"
    f"WHOWAS:{MAX_TARGETS},PRIVMSG:{MAX_TARGETS} STATUSMSG=@+ ELIST=CMNTU MONITOR={MAX_MONITORED} BOT=B"
    f" UTF8ONLY WHOX CHATHISTORY={PAGE_LINES} MSGREFTYPES=msgid,timestamp"
).split()
ISUPPORT = [(RPL_ISUPPORT, *_TOKENS[start : start + 13]) for start in range(0, len(_TOKENS), 13)]  # at most 13 a line


@command("RESUME <token>", 1, early=True)
def resume(call: Call) -> None:
    """A secret of 16 to 64 characters by which this client is known again."""
    session = call.session
    if session.registered or RESUME_CAP not in session.dialect.caps or not 16 <= len(call.params[0]) <= 64:
        raise CommandError(ERR_UNKNOWNCOMMAND, "RESUME")
    secret = f"http {call.params[0]}" if isinstance(session.dialect, Http) else call.params[0]  # over 64: nobody else's
    token, before = hashlib.sha256(secret.encode()).hexdigest()[:32], session.sent
    session.sent = call.hub.sent_before.pop(token, before if token == session.token else {})  # it may say so again
    session.token = token


@command("PING <token>", 1, early=True)
def ping(call: Call) -> None:
    if not call.params[0]:
        raise CommandError(ERR_NOORIGIN)
    answer = Message("PONG", (call.hub.name, call.params[0]), call.hub.name)
    check_length(answer)
    call.send_to(call.session, answer)


@command("PONG <token>", early=True)
def pong(call: Call) -> None:
    """That something was received is what counts."""


@command("QUIT [:<reason>]", early=True)
def quit_(call: Call) -> None:
    call.quit(call.session, f"{OWN_REASON} {call.message.param(0)}", "Goodbye")


# Channels.


@command("JOIN <channel>{,<channel>} [<key>{,<key>}] | 0", 1)
def join(call: Call) -> None:
    session = call.session
    if call.params[0] == "0" and not session.dialect.single:  # RFC 2812, section 3.2.1: leave all
        for channel in list(session.channels):
            call.part(session, channel, "")
        return
    keys = dict(zip(call.params[0].split(","), call.message.param(1).split(",")))
    checks = 0

    def join_one(name: str) -> None:
        nonlocal checks
        known = call.hub.channels.get(fold(check_channel(name)))
        checks += known.mask_checks(session) if known else 0
        if checks > BAN_CHECKS:
            raise CommandError(RPL_TRYAGAIN, "JOIN")
        join_channel(call, check_channel(name), keys.get(name, ""))

    for_each_target(call, join_one, most=1 if session.dialect.single else MAX_JOINS)


def join_channel(call: Call, name: str, key: str) -> None:
    """Takes the caller into a channel, which begins to exist with its first member."""
    hub, session = call.hub, call.session
    known, state = hub.channels.get(fold(name)), hub.restored.get(fold(name), "")
    channel = known or (Channel.restored(state) if state else Channel(name))
    if session in channel.members:
        return
    check_can_join(session, channel, key)
    others = 0 if session.dialect.single else len(session.channels)
    if others >= hub.limits.channels or not known and len(hub.channels) >= hub.limits.all_channels:
        raise CommandError(ERR_TOOMANYCHANNELS, name)
    if session.dialect.single:
        for old in list(session.channels):
            call.part(session, old, f"went to {name}")
    session.invites.pop(channel, None)
    call.join(channel)
    if hub.restored.pop(channel.folded, None) and "i" in channel.modes:  # nobody was there to invite
        channel.topic = ""
        call.save(channel, reopened=True)
    tags = {**call.tags(), COUNT_TAG: str(len(channel.members))}
    call.broadcast(join_message(session, channel, tags), channel)
    if channel.members[session] and len(channel.members) > 1:  # again, after a restart
        call.broadcast(Message("MODE", (channel.name, "+o", session.nick), hub.name, hub.ids.next()), channel)
    if session.away:
        tags = {**call.tags(), FOR_TAG: "away-notify"}
        call.broadcast(Message("AWAY", (session.away,), session.prefix, tags), channel, echo=False)
    send_channel_info(call, channel)
    asks = "draft/chathistory" in session.dialect.caps or NO_REPLAY_TAG in call.message.tags
    if hub.replay and not asks:
        batched = "batch" in session.dialect.caps
        call.query(functools.partial(replay, hub, channel.name, channel.logs, hub.ids.last, batched), hub.replay)


def check_can_join(session: Session, channel: Channel, key: str) -> None:
    """Raises CommandError where the modes of a channel do not let a session in. The first one after a restart needs no
    invitation, for nobody could give it, nor do its operators. An operator's invitation opens all but a key."""
    modes, invited = channel.modes, channel in session.invites
    if channel.is_banned(session) and not invited:
        raise CommandError(ERR_BANNEDFROMCHAN, channel.name)
    closed = "i" in modes and channel.members and not invited
    if closed and not (channel.awaits(session) or channel.matches("I", session)):
        raise CommandError(ERR_INVITEONLYCHAN, channel.name)
    if "k" in modes and not hmac.compare_digest(key.encode(), modes["k"].encode()):
        raise CommandError(ERR_BADCHANNELKEY, channel.name)
    if "l" in modes and len(channel.members) >= int(modes["l"]) and not invited:
        raise CommandError(ERR_CHANNELISFULL, channel.name)


def join_message(session: Session, channel: Channel, tags: Mapping[str, str]) -> Message:
    """JOIN with the account, of which there are none, and the real name: IRCv3 extended-join."""
    return Message("JOIN", (channel.name, "*", session.realname), session.prefix, tags)


def send_channel_info(call: Call, channel: Channel) -> None:
    """Sends what a newcomer must know of a channel: topic and names."""
    if channel.topic:
        send_topic(call, channel)
    if not call.session.dialect.single:
        send_names(call, channel)
        call.reply(RPL_ENDOFNAMES, channel.name)


def replay(
    hub: Hub, name: str, logs: tuple[str, ...], until: int, batched: bool, history: MemoryHistory
) -> list[Message]:
    """What was said last in a channel, for those who cannot ask, between lines that tell when; all in one batch, by
    which a client tells it from news."""
    said = history.fetch_all(logs, 0, until, hub.replay, True)
    if not said:
        return []
    first, last = (item.tags["time"].replace("T", " ")[:16] for item in (said[0], said[-1]))
    lines = [
        Message("NOTICE", (name, f"Said here before, since {first} UTC:"), hub.name),
        *(strip_private_tags(item, **{REPLAYED_TAG: ""}) for item in said),
        Message("NOTICE", (name, f"End of what was said before; the last was at {last} UTC"), hub.name),
    ]
    return batch_of(("chathistory", name), hub.name, lines) if batched else lines


@command("PART <channel>{,<channel>} [:<reason>]", 1)
def part(call: Call) -> None:

    def part_one(name: str) -> None:
        channel = find_channel(call, name)
        check_member(call, channel)
        call.part(call.session, channel, cut(call.message.param(1), REASON_BYTES))

    for_each_target(call, part_one, most=MAX_JOINS)


@command("KICK <channel>{,<channel>} <name>{,<name>} [:<reason>]", 2)
def kick(call: Call) -> None:
    """Puts out of one channel, or each name out of the channel in its place: RFC 2812, section 3.2.8."""
    reason = cut(call.message.param(2), REASON_BYTES) or call.session.nick
    names = targets(call, call.params[1])
    places = dict(zip(names, call.params[0].split(",") if "," in call.params[0] else call.params[:1] * len(names)))

    def kick_one(nick: str) -> None:
        channel = find_channel(call, places.get(nick, ""))
        check_member(call, channel, "o")  # each time: an operator may kick itself, too
        call.part(find_member(call, channel, nick), channel, reason)

    for_each_target(call, kick_one, index=1)


@command("INVITE <name> <channel>", 2)
def invite(call: Call) -> None:
    other, channel = find_user(call, call.params[0]), find_channel(call, call.params[1])
    check_member(call, channel, "o" if "i" in channel.modes else "")
    if other in channel.members:
        raise CommandError(ERR_USERONCHANNEL, other.nick, channel.name)
    if "o" in channel.members[call.session]:
        other.invites[channel] = None
        if len(other.invites) > MAX_JOINS:
            del other.invites[next(iter(other.invites))]
    call.reply(RPL_INVITING, other.nick, channel.name)
    message = Message("INVITE", (other.nick, channel.name), call.session.prefix, call.tags())
    relay_private(call, other, message)
    told = message._replace(tags={**message.tags, FOR_TAG: "invite-notify"})
    call.broadcast(told, channel, echo=False)


@command("TOPIC <channel> [:<topic>]", 1)
def topic(call: Call) -> None:
    channel = find_channel(call, call.params[0])
    check_member(call, channel)
    if len(call.params) == 1:
        send_topic(call, channel)
        return
    check_member(call, channel, "o" if "t" in channel.modes else "")
    if len(call.params[1].encode()) > TOPIC_BYTES:
        raise CommandError(ERR_INPUTTOOLONG)
    channel.topic, channel.topic_by, channel.topic_time = call.params[1], call.session.prefix, int(time.time())
    call.save(channel)
    call.broadcast(Message("TOPIC", (channel.name, channel.topic), channel.topic_by, call.tags()), channel)


def send_topic(call: Call, channel: Channel) -> None:
    """331, or 332 and 333"""
    if not channel.topic:
        call.reply(RPL_NOTOPIC, channel.name)
        return
    call.reply(RPL_TOPIC, channel.name, channel.topic)
    call.reply(RPL_TOPICWHOTIME, channel.name, channel.topic_by, str(channel.topic_time))


@command("NAMES <channel>{,<channel>}")
def names(call: Call) -> None:
    """353 for each text of names in each channel, then one 366."""
    check_query_rate(call)

    def names_of_one(name: str) -> None:
        try:
            channel = find_channel(call, name)
            if channel.is_hidden(call.session):
                raise CommandError(ERR_NOSUCHCHANNEL, name)
            send_names(call, channel)
        except CommandError:
            if call.session.dialect.single:  # a person is told why there is no answer
                raise

    for_each_target(call, names_of_one)
    call.reply(RPL_ENDOFNAMES, ",".join(map(safe_param, targets(call, call.message.param(0)))))


def send_names(call: Call, channel: Channel) -> None:
    """353 for each text of names, of those who are visible. Who has no WHO sees who is away: in the text, a script by
    events."""
    session, caps = call.session, call.session.dialect.caps
    texts = channel.names(caps)
    if call.hub.invisible and session not in channel.members:
        hidden = {channel.name_of(x, caps) for x in channel.members if x.modes and not is_visible(call, x)}
        kept = (" ".join(name for name in text.split() if name not in hidden) for text in texts)
        texts = list(filter(None, kept))
    away = [member for member in channel.members if member.away] if session.dialect.single else []
    if away:
        nicks = {member.nick for member in away}
        names = [f"{name} (away)" if name.lstrip("@+") in nicks else name for name in " ".join(texts).split()]
        texts = split_text(" ".join(names), NAMES_BYTES)
    if texts:
        call.reply_lines(RPL_NAMREPLY, "@" if "s" in channel.modes else "=", channel.name, texts=texts)
    call.replies += [Message("AWAY", (member.away,), member.prefix) for member in away[:AWAY_SHOWN]]


ELIST = re.compile("([ct]?)([<>])([0-9]{1,9})")


def is_listed(channel: Channel, item: str) -> bool:
    """Whether a channel meets an item of LIST, folded: a mask, !mask, >users, C>minutes since it began, T>minutes since
    its topic was set; or < instead."""
    condition = ELIST.fullmatch(item)
    if not condition:
        return bool(search_pattern(item.lstrip("!")).fullmatch(channel.folded)) != item.startswith("!")
    since = {"c": channel.created, "t": channel.topic_time}.get(condition[1], 1)
    value = (time.time() - since) / 60 if condition[1] else len(channel.members)
    return since > 0 and (value < int(condition[3]) if condition[2] == "<" else value > int(condition[3]))


@command("LIST [<channel or condition>{,<channel or condition>}]")
def list_(call: Call) -> Rows:
    """The channels that have one of the names or match one of the masks, if there are any, and meet all conditions."""
    channels, left = call.hub.channels, MAX_LISTED
    asked = dict.fromkeys(fold(item) for item in call.message.param(0).split(",") if item)
    names = all(item[0] == "#" and not set("*?") & set(item) for item in asked)  # which are found without a search
    items = [] if names else list(asked)
    if len(items) > MAX_TARGETS:
        raise CommandError(ERR_TOOMANYTARGETS)
    masks = [item for item in items if item[0] in "#*?"]
    groups = [[item] for item in items if item not in masks] + [masks] * bool(masks)  # one of each must be met
    yield RPL_LISTSTART, "Channel"
    for name in list(names and asked or channels):
        channel = channels.get(name)
        is_asked = channel and all(any(is_listed(channel, item) for item in group) for group in groups)
        if not channel or not is_asked or channel.is_hidden(call.session):
            yield ()
        elif left:
            left -= 1
            yield RPL_LIST, channel.name, str(len(channel.members)), channel.topic
        else:
            yield ERR_TOOMANYMATCHES, "LIST"
            break
    yield (RPL_LISTEND,)


# Modes.


class ModeChange(NamedTuple):
    on: bool
    letter: str
    param: str  # '' where there is none


# Makes a change; returns the parameter that the members are told, or None if nothing has changed; raises CommandError.
ModeHandler = Callable[[Call, Channel, ModeChange], Optional[str]]


@command("MODE <name> [<modes>] | <channel> [<modes>{ <parameter>}]", 1)
def mode(call: Call) -> None:
    target, asked = call.params[0], call.message.param(1)
    if not target.startswith("#") and target != CURRENT_CHANNEL:
        if find_user(call, target) is not call.session:
            raise CommandError(ERR_USERSDONTMATCH)
        change_user_modes(call, asked)
        return
    channel = find_channel(call, target)
    if not asked:
        send_modes(call, channel)
        return
    last = {(change.letter, change.param): change for change in parse_modes(call.params[1:])}
    changes = list(last.values())  # of changes to and fro, the last counts
    wanted = [change for change in changes if change.letter not in MASK_LISTS or change.param]
    for letter in dict.fromkeys(change.letter for change in changes if change not in wanted):
        send_masks(call, channel, letter)
    if wanted:
        check_member(call, channel, "o")
        change_modes(call, channel, wanted)


def parse_modes(params: tuple[str, ...]) -> Iterator[ModeChange]:
    """The changes that MODE asks for, at most MAX_MODES with a parameter."""
    on, words, room = True, iter(params[1:]), MAX_MODES
    for letter in params[0]:
        if letter in "+-":
            on = letter == "+"
            continue
        takes = letter in "beIkov" or (letter == "l" and on)
        param = next(words, "") if takes else ""
        room -= bool(param)
        if room >= 0 or not param:
            yield ModeChange(on, letter, param)


def format_modes(changes: list[ModeChange]) -> str:
    """Changes as MODE writes them, without their parameters: +ab-c."""
    groups = itertools.groupby(changes, key=lambda change: change.on)
    return "".join(("+" if on else "-") + "".join(change.letter for change in same) for on, same in groups)


USER_MODES = "Bi"


def change_user_modes(call: Call, asked: str) -> None:
    """[+-]B: is a bot; [+-]i: invisible to strangers"""
    hub, session = call.hub, call.session
    if not asked:
        call.reply(RPL_UMODEIS, f"+{session.modes}")
    last = {change.letter: change for change in parse_modes((asked,))}
    if set(last) - set(USER_MODES):
        call.reply_error(CommandError(ERR_UMODEUNKNOWNFLAG))
    done = [last[letter] for letter in USER_MODES if letter in last and last[letter].on != (letter in session.modes)]
    if done:
        before, after = session.modes, set(session.modes) ^ {change.letter for change in done}
        session.modes = "".join(sorted(after))
        hub.invisible += ("i" in after) - ("i" in before)
        call.send_to(session, Message("MODE", (session.nick, format_modes(done)), session.prefix, call.tags()))


def change_modes(call: Call, channel: Channel, changes: list[ModeChange], source: str = "") -> None:
    """Makes changes, as far as each is possible, and tells the members in one line what has changed, and that it was
    the caller, or `source`."""
    done: list[ModeChange] = []
    for change in changes:
        try:
            if change.letter not in MODES:
                raise CommandError(ERR_UNKNOWNMODE, change.letter)
            param = MODES[change.letter](call, channel, change)
        except CommandError as error:
            call.reply_error(error)
        else:
            done += [change._replace(param=param)] if param is not None else []
    if not done:
        return
    if any(change.letter != "v" for change in done):
        call.save(channel, reopened=any(change.letter in "ik" and not change.on for change in done))
    words = (channel.name, format_modes(done), *(change.param for change in done if change.param))
    call.broadcast(Message("MODE", words, source or call.session.prefix, call.tags()), channel)


def set_mode(call: Call, channel: Channel, change: ModeChange) -> str | None:
    """[+-]C: no CTCP but ACTION; i: only who is invited may join; m: only who has a rank may speak; n: only members
    may; s: hidden from who is no member; t: only operators set the topic; +k <key> | -k [<key>]: only who knows it may
    join; +l <members> | -l: no more may join"""
    letter, value = change.letter, change.param
    if not change.on:
        before = channel.modes.pop(letter, None)
        return None if before is None else "*" if letter == "k" else ""
    if letter in "kl" and not value and call.message.text:  # there is none; an empty one is a wrong one
        raise CommandError(ERR_NEEDMOREPARAMS, "MODE")
    if letter == "k" and not is_word(value, KEY_BYTES):
        raise CommandError(ERR_INVALIDMODEPARAM, channel.name, "k", "*")
    if letter == "l" and not re.fullmatch("0*[1-9][0-9]{0,5}", value):
        raise CommandError(ERR_INVALIDMODEPARAM, channel.name, "l", value)
    value = value.lstrip("0") if letter == "l" else value
    if channel.modes.get(letter) == value:
        return None
    channel.modes[letter] = value
    return value


def set_mask(call: Call, channel: Channel, change: ModeChange) -> str | None:
    """[+-]b <mask>: whom it matches may neither join nor, without a rank, speak; e: may, in spite of b; I: needs no
    invitation"""
    letter, mask = change.letter, full_mask(change.param)
    if not is_word(mask, MASK_BYTES):
        raise CommandError(ERR_INVALIDMODEPARAM, channel.name, letter, change.param)
    if change.on == (fold(mask) in channel.masks[letter]):
        return None
    if not change.on:
        return channel.remove_mask(letter, mask)
    if sum(map(len, channel.masks.values())) >= MAX_BANS:
        raise CommandError(ERR_BANLISTFULL, channel.name, letter)
    try:
        channel.add_mask(letter, mask, call.session.prefix, str(int(time.time())))
    except ValueError:
        raise CommandError(ERR_INVALIDMODEPARAM, channel.name, letter, change.param) from None
    return mask


def set_rank(call: Call, channel: Channel, change: ModeChange) -> str | None:
    """[+-]o <name>: operator; [+-]v <name>: may speak in a moderated channel"""
    if not change.param:
        raise CommandError(ERR_NEEDMOREPARAMS, "MODE")
    member = find_member(call, channel, change.param)
    rank = channel.members[member]
    if change.on == (change.letter in rank):
        return None
    channel.members[member] = "".join(x for x in "ov" if (change.on if x == change.letter else x in rank))
    channel.changed()
    return member.nick


MASK_LISTS = {
    "b": (RPL_BANLIST, RPL_ENDOFBANLIST),
    "e": (RPL_EXCEPTLIST, RPL_ENDOFEXCEPTLIST),
    "I": (RPL_INVEXLIST, RPL_ENDOFINVEXLIST),
}
MODES: dict[str, ModeHandler] = dict.fromkeys(MASK_LISTS, set_mask)
MODES.update({**dict.fromkeys("ov", set_rank), **dict.fromkeys("Cimnstkl", set_mode)})


def send_modes(call: Call, channel: Channel) -> None:
    """324, in which only members see the key, and 329"""
    letters = sorted(channel.modes)
    shown = {**channel.modes, **({} if call.session in channel.members else {"k": "*"})}
    words = [shown[letter] for letter in letters if shown[letter]]
    call.reply(RPL_CHANNELMODEIS, channel.name, f"+{''.join(letters)}", *words)
    call.reply(RPL_CREATIONTIME, channel.name, str(channel.created))


def send_masks(call: Call, channel: Channel, letter: str) -> None:
    """367 for each ban, then 368; and the like for exceptions"""
    row, end = MASK_LISTS[letter]
    for ban in channel.masks[letter].values():
        call.reply(row, channel.name, ban.mask, ban.by, ban.time)
    call.reply(end, channel.name)


# Messages.


@command("PRIVMSG <target>{,<target>} :<text>")
def privmsg(call: Call) -> None:
    if not call.params:
        raise CommandError(ERR_NORECIPIENT)
    if not call.message.param(1):
        raise CommandError(ERR_NOTEXTTOSEND)
    for_each_target(call, functools.partial(relay, call))


@command("NOTICE <target>{,<target>} :<text>", 2)
def notice(call: Call) -> None:
    """Never answered, not even with an error: RFC 2812, section 3.3.2."""
    for target in targets(call, call.params[0])[:MAX_TARGETS] if call.params[1] else ():
        with contextlib.suppress(CommandError):
            relay(call, target)


@command("TAGMSG <target>{,<target>}", 1)
def tagmsg(call: Call) -> None:
    for_each_target(call, functools.partial(relay, call))


@command("BATCH +<reference> draft/multiline <target> | -<reference>", 1)
def batch(call: Call) -> None:
    """Begins or ends a message of several lines (IRCv3 draft/multiline). Its lines come here, too: see is_in_batch."""
    session, message, found = call.session, call.message, call.session.batch
    if MULTILINE_CAP not in session.dialect.caps:
        raise CommandError(ERR_UNKNOWNCOMMAND, message.command)
    mark, reference = "", message.tags.get("batch", "")
    if message.command == "BATCH":
        mark, reference = message.params[0][:1], message.params[0][1:]
    call.message = message._replace(command="BATCH")  # which an error is about
    if mark == "+" and (not found or found.failed):
        session.batch = MultilineBatch(message)
        session.batch.check_target()
        call.label = ""  # it is answered at the end
    elif found and not found.failed:
        continue_batch(call, found, message, mark if reference == found.reference else "?")
    elif not found or reference != found.reference:
        raise CommandError(FAIL_MULTILINE)
    elif mark == "-":
        session.batch = None


def continue_batch(call: Call, found: MultilineBatch, message: Message, mark: str) -> None:
    """Adds a line to a batch, or relays all as one message. What the caller gets has the label of its first line."""
    hub, session = call.hub, call.session
    try:
        if mark == "-":
            session.batch = None
            whole = found.whole()
            bucket = session.flood_bucket if session.dialect.single else None  # all came in one line
            if bucket:
                bucket.debit(time.monotonic(), len(found.lines) - 1)
            dispatch(hub, session, whole)
        elif mark:
            raise CommandError(FAIL_MULTILINE)
        else:
            found.add(message)
    except CommandError as error:
        found.failed = True
        answer = Call(hub, session, found.first)
        answer.reply_error(error)
        hub.append(answer)


STATUSMSG = {"@": ("o", "ov"), "+": ("o", "v", "ov")}  # the ranks of a channel that hear what is sent to @#chat


def relay(call: Call, target: str) -> None:
    """Relays a message to one target. A resend with the same client id is delivered only once. Raises CommandError."""
    hub, session, tags = call.hub, call.session, call.message.tags
    channel, other = None, session
    sign = target[:1] if target[:1] in STATUSMSG and target[1:2] == "#" else ""
    if sign or target.startswith("#") or target == CURRENT_CHANNEL:
        channel = find_channel_to_speak(call, target[len(sign) :])
    else:
        other = find_user(call, target)
    to = sign + channel.name if channel else other.nick
    key = (session.token, tags[ID_TAG], fold(to)) if session.token and ID_TAG in tags else None
    known = session.sent.get(key) if key else None
    if known and known.stored is not False:
        call.stored += (known,)
        call.acknowledge(known.message)
        return
    text = () if call.message.command == "TAGMSG" else call.params[1:2]
    new_tags = call.tags()
    if tags:
        new_tags.update((tag, value) for tag, value in tags.items() if tag.startswith("+") or tag == LINES_TAG)
    message = Message(call.message.command, (to, *text), session.prefix, new_tags)
    for line in each_line(message) if LINES_TAG in new_tags else (message,):
        check_length(line)
    session.last_spoke = time.time()
    hub.messages += 1
    log_name = (
        "" if sign or not text else channel.logs[-1] if channel else private_log(session.identity, other.identity)
    )
    item = StoredMessage(log_name, message, session.identity, key)
    session.last_id = message.tags["msgid"] if channel and log_name else session.last_id
    call.stored += (item,)
    deliver(call, message, channel, other)
    if key:
        session.sent.pop(key, None)
        session.sent[key] = item
        if len(session.sent) > DEDUP_IDS:
            del session.sent[next(iter(session.sent))]


def deliver(call: Call, message: Message, channel: Channel | None, other: Session) -> None:
    """Sends a message to a channel or to one user, and its echo or receipt to the caller."""
    session, echoes = call.session, "echo-message" in call.session.dialect.caps
    ranks = STATUSMSG.get(message.param(0)[0])
    if channel and ranks:
        echo, members = False, channel.members.items()
        heard = [member for member, rank in members if rank in ranks and member is not session]
        call.effects.append(Multicast(heard, [message]))
    elif channel:
        echo = session in channel.members and not call.ref and echoes
        call.broadcast(message, channel, echo=echo)
    elif other is session and call.label and echoes:
        echo = False  # IRCv3 labeled-response: of the two that it gets, the echo has the label
        call.effects.append(Multicast([session], [message]))
    else:
        echo = other is session
        relay_private(call, other, message)
    if not echo:
        call.acknowledge(message)


CTCP_RE = re.compile("\x01(?!ACTION[ \x01])")


def find_channel_to_speak(call: Call, target: str) -> Channel:
    """A channel in which the caller may say what it wants to; raises CommandError where that is not so."""
    session, may_stay_out = call.session, SPEAK_CAP in call.session.dialect.caps and target != CURRENT_CHANNEL
    if may_stay_out and fold(target) not in call.hub.channels:
        join_channel(call, check_channel(target), "")  # where nobody is
    channel = find_channel(call, target)
    rank = channel.members.get(session)
    if "C" in channel.modes and any(CTCP_RE.match(line.text) for line in split_lines(call.message)):
        raise CommandError(ERR_NOCTCP, channel.name)
    if rank:
        return channel
    if rank is None and may_stay_out:
        check_can_join(session, channel, "")
    elif rank is None and "n" in channel.modes:
        raise CommandError(ERR_CANNOTSENDTOCHAN, channel.name)
    if "m" in channel.modes:
        raise CommandError(ERR_MODERATED, channel.name)
    if channel.is_banned(session):
        raise CommandError(ERR_SILENCED, channel.name)
    return channel


def relay_private(call: Call, other: Session, message: Message) -> None:
    """Sends a message to one user, or keeps it until their connection is back."""
    text = other.away
    if other.stage == Stage.REGISTERED:
        call.send_to(other, message)
    elif TYPING_TAG in message.tags:
        return  # no longer true when they are back
    elif len(other.resume_queue) < RESUME_QUEUE:
        other.resume_queue.append(message)
        text = "no connection; gets this on coming back within seconds"
    else:
        raise CommandError(ERR_NOSUCHNICK, other.nick)
    if text and message.command in ("PRIVMSG", "INVITE"):
        call.reply(RPL_AWAY, other.nick, text)


@command("REDACT <channel or name> <msgid or *> [:<reason>]", 2)
def redact(call: Call) -> None:
    """Removes a message of the caller, * for the last one in a channel, whose operators may remove anybody's."""
    session, (target, msgid) = call.session, call.params[:2]
    here = target == CURRENT_CHANNEL and session.dialect.single
    channel = find_channel(call, target) if here else call.hub.channels.get(fold(target))
    other = call.hub.nicks.get(fold(target))
    if channel and session in channel.members:
        name, logs, rank = channel.name, channel.logs, channel.members[session]
    elif other and other.stage == Stage.REGISTERED:
        name, logs, rank = other.nick, (private_log(session.identity, other.identity),), ""
    else:
        raise CommandError(FAIL_REDACT_TARGET, target)
    try:
        number = parse_reference(f"msgid={session.last_id if msgid == '*' else msgid}")[0]
    except ValueError:
        raise CommandError(FAIL_UNKNOWN_MSGID, name, msgid) from None
    is_silent = channel and not rank and ("m" in channel.modes or channel.is_banned(session))
    reason = "" if is_silent else cut(call.message.param(2), REASON_BYTES)
    words = (name, f"{number:x}", *([reason] if reason else []))
    message = Message("REDACT", words, session.prefix, call.tags())
    call.effects.append(Redaction(name, logs, number, "" if "o" in rank else session.identity))
    if channel:
        call.broadcast(message, channel)
    elif other:
        call.effects.append(Multicast([other] if other is not session else [], [message]))
        call.replies.append(message)


@command("AWAY [:<text>]")
def away(call: Call) -> None:
    session, text = call.session, call.message.param(0)
    if len(text.encode()) > AWAY_BYTES:
        raise CommandError(ERR_INPUTTOOLONG)
    if session.away != text:
        words = (text,) if text else ()
        notify_peers(call, Message("AWAY", words, session.prefix, call.tags()), "away-notify")
        session.away = text
    call.reply(RPL_NOWAWAY if text else RPL_UNAWAY)


@command("SETNAME :<real name>", 1)
def setname(call: Call) -> None:
    session = call.session
    if not 0 < len(call.params[0].encode()) <= REALNAME_BYTES:
        raise CommandError(FAIL_INVALID_REALNAME)
    change = Message("SETNAME", call.params[:1], session.prefix, call.tags())
    notify_peers(call, change, "setname")
    session.realname = call.params[0]
    if "setname" in session.dialect.caps:
        call.send_to(session, change)


# Queries.

TARGETS_BATCH = "draft/chathistory-targets"
Span = Tuple[int, int]  # the first and the last sequence number that a reference means
Page = Tuple[int, int, int, bool]  # low, high, limit, newest: see MemoryHistory.fetch
LogFinder = Callable[[MemoryHistory], Tuple[MemoryHistory, Tuple[str, ...]]]  # run by the mailer
# What a subcommand of CHATHISTORY asks for, from its references and limit.
PAGES: dict[str, Callable[[list[Span], int], list[Page]]] = {
    "LATEST": lambda spans, limit: [(spans[0][1], MAX_SEQUENCE, limit, True)],
    "BEFORE": lambda spans, limit: [(0, spans[0][0], limit, True)],
    "AFTER": lambda spans, limit: [(spans[0][1], MAX_SEQUENCE, limit, False)],
    "AROUND": lambda spans, limit: [
        (0, spans[0][0], limit // 2, True),
        (spans[0][0] - 1, MAX_SEQUENCE, -(-limit // 2), False),
    ],
    "BETWEEN": lambda spans, limit: [
        (spans[0][1], spans[1][0], limit, False) if spans[0] < spans[1] else (spans[1][1], spans[0][0], limit, True)
    ],
}


@command(
    "CHATHISTORY LATEST <target> <reference or *> <limit> | BEFORE, AFTER or AROUND <target> <reference> <limit>"
    " | BETWEEN <target> <reference> <reference> <limit> | TARGETS <timestamp> <timestamp> <limit>",
    1,
)
def chathistory(call: Call) -> None:
    hub, sub, words = call.hub, call.params[0].upper(), call.params[1:]
    check_query_rate(call)
    if sub not in PAGES and sub != "TARGETS":
        raise CommandError(FAIL_UNKNOWN_COMMAND, sub)
    references = words[0 if sub == "TARGETS" else 1 : -1]
    try:
        limit = min(int(words[-1]), PAGE_LINES)
        spans = [(0, 0) if (word, sub) == ("*", "LATEST") else parse_reference(word) for word in references]
    except (IndexError, ValueError):
        raise CommandError(FAIL_INVALID_PARAMS, sub) from None
    if limit < 0 or len(spans) != (2 if sub in ("BETWEEN", "TARGETS") else 1):
        raise CommandError(FAIL_INVALID_PARAMS, sub)
    if sub == "TARGETS":
        names = {channel.logs: channel.name for channel in call.session.channels}
        run = functools.partial(target_messages, hub, call.session.identity, names, spans, limit)
        call.query(run, len(names), TARGETS_BATCH)
        return
    name, find_logs = readable_logs(call, sub, words[0])
    until = hub.ids.last + 1  # what comes later in the log is sent as such
    pages = [(low, min(high, until), size, newest) for low, high, size, newest in PAGES[sub](spans, limit)]
    times = [first for first, last in spans if last > first]  # a time, not a message
    since = {low: server_time((low + 500) / 1e6) for first in times for low in (first - 1, first + 999)}
    marks = {REPLAYED_TAG: ""} if call.session.dialect.single else {}
    call.query(functools.partial(page_messages, find_logs, pages, since, marks), limit, "chathistory", name)
    if call.ref and call.session.dialect.single:  # IRC has batches for that
        call.replies.append(Message("ACK", (), hub.name, {"label": call.ref}))


def readable_logs(call: Call, sub: str, name: str) -> tuple[str, LogFinder]:
    """A channel's name, or a nick as it was given, and where the caller reads what was said there, or with that user
    alone: who has the nick now, or else had it last. Raises CommandError."""
    hub, identity = call.hub, call.session.identity
    channel, other = hub.channels.get(fold(name)), hub.nicks.get(fold(name))
    if channel and call.session in channel.members:
        logs = channel.logs
        return channel.name, lambda history: (history, logs)
    if not is_nick(name):
        raise CommandError(FAIL_INVALID_TARGET, sub, name)
    if other and other.registered:
        log = private_log(identity, other.identity)
        return name, lambda history: (hub.private, (log,))
    return name, lambda history: (hub.private, hub.private.partners(identity).get(fold(name), ("", ""))[1:2])


def page_messages(
    find_logs: LogFinder, pages: list[Page], since: dict[int, str], marks: dict[str, str], history: MemoryHistory
) -> list[Message]:
    """Pages of what was said somewhere, by its own time where `since` has their low; each with `marks`, too."""
    history, logs = find_logs(history)
    found = (history.fetch_all(logs, *page, since.get(page[0], "")) for page in pages)
    return [strip_private_tags(message, **marks) for page in found for message in page]


def target_messages(
    hub: Hub, identity: str, names: dict[tuple[str, ...], str], spans: list[Span], limit: int, history: MemoryHistory
) -> list[Message]:
    """Of channels, logs -> name, and those with whom somebody has spoken alone, where the last message is in a span of
    time: the last of them where that was given backwards."""
    last = {name: item for logs, name in names.items() for item in history.fetch_all(logs, 0, MAX_SEQUENCE, 1, True)}
    last.update((nick, item) for nick, _, item in hub.private.partners(identity).values())
    start, end = (server_time((first + 500) / 1e6) for first, _ in sorted(spans))
    found = sorted((sequence(item), name) for name, item in last.items() if start < item.tags["time"] < end)
    found = found[max(len(found) - limit, 0) :] if spans[0] > spans[1] else found[:limit]
    return [Message("CHATHISTORY", ("TARGETS", name, last[name].tags["time"]), hub.name) for _, name in found]


@command("WHO <channel, name or mask> [%<fields>[,<token>]]")
def who(call: Call) -> Rows:
    mask = call.message.param(0)
    channel = call.hub.channels.get(fold(mask))
    if channel and channel.is_hidden(call.session):
        channel = None
    pattern = search_pattern(full_mask(mask)) if not channel and set("*?") & set(mask) else None
    members = channel.members if channel else call.hub.sessions if pattern else find_registered(call, [mask])
    is_named = not (channel or pattern)  # then it is told also of who is invisible
    fields, _, token = call.message.param(1).partition("%")[2].partition(",")
    for member in list(members):
        here = member in channel.members if channel else member.registered  # it may have left meanwhile
        is_asked = pattern is None or pattern.fullmatch(fold(member.prefix))
        if not (here and is_asked and (is_named or is_visible(call, member))):
            yield ()
            continue
        values = who_fields(call, member, channel)
        if fields:  # WHOX: only what was asked for, in the order of its specification
            values["t"] = token[:3] or "0"
            yield (RPL_WHOSPCRPL, *(values[key] for key in "tcuihsnfdlaor" if key in fields))
        else:
            yield (RPL_WHOREPLY, *(values[key] for key in "cuhsnf"), f"0 {member.realname}")
    yield RPL_ENDOFWHO, safe_param(mask)


def who_fields(call: Call, member: Session, channel: Channel | None) -> dict[str, str]:
    """What WHO tells of a member, by the letters of WHOX."""
    rank = signs(channel.members[member], call.session.dialect.caps) if channel else ""
    return {
        "c": channel.name if channel else "*",
        "u": member.user,
        "i": "255.255.255.255",  # WHOX: an address that is not told
        "h": member.host,
        "s": call.hub.name,
        "n": member.nick,
        "f": ("G" if member.away else "H") + rank + "B" * ("B" in member.modes),
        "d": "0",
        "l": str(int(time.time() - member.last_spoke)),
        "a": "0",
        "o": "n/a",
        "r": member.realname,
    }


@command("WHOIS [<server>] <name>", 1)
def whois(call: Call) -> Rows:
    for other in find_registered(call, call.params[-1:]):
        yield RPL_WHOISUSER, other.nick, other.user, other.host, "*", other.realname
        session, caps = call.session, call.session.dialect.caps
        hides = "i" in other.modes and other is not session
        shown = [room for room in other.channels if session in room.members or not (hides or room.is_hidden(session))]
        names = [signs(channel.members[other], caps) + channel.name for channel in shown]
        for start in range(0, len(names), 4):  # so many fit in a line, however long they are
            yield RPL_WHOISCHANNELS, other.nick, " ".join(names[start : start + 4])
        yield RPL_WHOISSERVER, other.nick, call.hub.name, VERSION
        if other.away:
            yield RPL_AWAY, other.nick, other.away
        if "B" in other.modes:
            yield RPL_WHOISBOT, other.nick
        yield RPL_WHOISIDLE, other.nick, str(int(time.time() - other.last_spoke)), str(int(other.signon))
        yield RPL_ENDOFWHOIS, other.nick
        return
    call.reply_error(CommandError(ERR_NOSUCHNICK, call.params[-1]))
    yield RPL_ENDOFWHOIS, safe_param(call.params[-1])


def find_registered(call: Call, nicks: Iterable[str]) -> list[Session]:
    """The registered sessions with one of these nicks."""
    found = [call.hub.nicks.get(fold(nick)) for nick in nicks]
    return [session for session in found if session and session.registered]


@command("ISON <name>{ <name>}", 1)
def ison(call: Call) -> Rows:
    here = find_registered(call, " ".join(call.params).split())
    return list_rows(RPL_ISON, [other.nick for other in here], " ") or [(RPL_ISON, "")]


@command("MONITOR + <name>{,<name>} | - <name>{,<name>} | C | L | S", 1)
def monitor(call: Call) -> Rows:
    hub, session, sub = call.hub, call.session, call.params[0].upper()
    names = dict(session.monitored)
    if sub in ("+", "-"):
        names = {fold(name): name for name in call.message.param(1).split(",") if is_nick(name)}
    if sub in ("-", "C"):
        hub.unmonitor(session, names)
    elif sub == "+":
        hub.monitor(session, names)
        full = ",".join(name for folded, name in names.items() if folded not in session.monitored)
        if full:
            yield ERR_MONLISTFULL, str(MAX_MONITORED), cut(full, NAMES_BYTES)
    if sub in ("+", "S"):
        names = {folded: name for folded, name in names.items() if folded in session.monitored}
        here = {fold(other.nick): other.prefix for other in find_registered(call, names)}
        yield from list_rows(RPL_MONONLINE, here.values())
        yield from list_rows(RPL_MONOFFLINE, [name for folded, name in names.items() if folded not in here])
    if sub == "L":
        yield from list_rows(RPL_MONLIST, names.values())
        yield (RPL_ENDOFMONLIST,)


def list_rows(numeric: Numeric, words: Iterable[str], separator: str = ",") -> list[tuple[Any, ...]]:
    """Words in lists, as many in each row as fit in a line."""
    return [(numeric, piece.replace(" ", separator)) for piece in split_text(" ".join(words), NAMES_BYTES)]


@command("USERHOST <name>{ <name>}", 1)
def userhost(call: Call) -> Rows:
    found = find_registered(call, call.params[:5])
    items = [f"{other.nick}={'-' if other.away else '+'}{other.user}@{other.host}" for other in found]
    return list_rows(RPL_USERHOST, items, " ") or [(RPL_USERHOST, "")]


@command("LUSERS")
def lusers(call: Call) -> Rows:
    hub = call.hub
    visible, counts = hub.registered - hub.invisible, (str(hub.registered), str(hub.most_registered))
    yield RPL_LUSERCLIENT, f"There are {visible} users and {hub.invisible} invisible on 1 servers"
    yield RPL_LUSEROP, "0"
    yield RPL_LUSERUNKNOWN, str(len(hub.sessions) - hub.registered)
    yield RPL_LUSERCHANNELS, str(len(hub.channels))
    yield RPL_LUSERME, f"I have {hub.registered} clients and 0 servers"
    yield (RPL_LOCALUSERS, *counts)
    yield (RPL_GLOBALUSERS, *counts)


@command("MOTD [<server>]")
def motd(call: Call) -> Rows:
    yield RPL_MOTDSTART, f"- {call.hub.name} message of the day -"
    yield RPL_MOTD, f"- Everybody meets in {DEFAULT_CHANNEL}."
    yield (RPL_ENDOFMOTD,)


@command("WHOWAS <name>{,<name>} [<count>]", 1)
def whowas(call: Call) -> Rows:
    patterns = [search_pattern(name) for name in call.params[0].split(",")[:MAX_TARGETS]]
    gone = [item for item in call.hub.gone if any(pattern.fullmatch(fold(item[0][0])) for pattern in patterns)]
    count = call.message.param(1)
    for user, left in gone[: int(count) if re.fullmatch("[1-9][0-9]{0,3}", count) else None]:
        yield (RPL_WHOWASUSER, *user)
        yield RPL_WHOISSERVER, user[0], call.hub.name, left
    if not gone:
        yield ERR_WASNOSUCHNICK, safe_param(call.params[0])
    yield RPL_ENDOFWHOWAS, safe_param(call.params[0])


def help_(call: Call) -> Rows:
    """What /help says to people; to IRC clients, the commands, or the grammar of one."""
    asked, subject = call.message.param(0), safe_param(call.message.param(0))
    lines = help_lines(asked)
    if not call.session.dialect.single:
        lines = ["HELP with one of these tells how it is written:", *split_text(" ".join(sorted(COMMANDS)), 80)]
        if asked:
            if asked.upper() not in COMMANDS:
                raise CommandError(ERR_HELPNOTFOUND, asked)
            lines = [COMMANDS[asked.upper()].grammar, *help_lines(asked)[1:]]
    for numeric, line in itertools.zip_longest((RPL_HELPSTART,), lines, fillvalue=RPL_HELPTXT):
        yield numeric, subject, line
    yield RPL_ENDOFHELP, subject


REPORTS: dict[str, Callable[[Call], Rows]] = {
    "VERSION [<server>]": lambda call: [
        (RPL_VERSION, VERSION, call.hub.name, SERVER_INFO),
        *ISUPPORT,
    ],
    "INFO [<server>]": lambda call: [
        (RPL_INFO, f"{VERSION}, {SERVER_INFO}"),
        (RPL_INFO, f"Started {server_time(call.hub.started)}"),
        (RPL_ENDOFINFO,),
    ],
    "TIME [<server>]": lambda call: [(RPL_TIME, call.hub.name, server_time(time.time()))],
    "LINKS": lambda call: [(RPL_LINKS, call.hub.name, call.hub.name, f"0 {SERVER_INFO}"), (RPL_ENDOFLINKS, "*")],
    **dict.fromkeys(("HELP [<command>]", "HELPOP [<command>]"), help_),
    # For operators of the server, whom IRC does not know here.
    "OPER <name> <password>": lambda call: [(ERR_NOOPERHOST,)],
    "KILL <name> :<reason>": lambda call: [(ERR_NOPRIVILEGES,)],
    "WALLOPS :<text>": lambda call: [(ERR_NOPRIVILEGES,)],
}
for grammar, report in REPORTS.items():
    command(grammar)(report)


# -----------------------------------------------------------------------------
# delivery
# -----------------------------------------------------------------------------
# What becomes of a batch of the log: it is stored, then its effects are applied in order, and what each session gets of
# all that is one sequence of bytes. In the mailer's thread, without the hub's lock.


def commit(hub: Hub, batch: list[Call]) -> list[Effect]:
    """Stores the batch in one transaction and runs its history queries. If storing fails, nothing of it is delivered
    and the senders get an error."""
    pending = [item for call in batch for item in call.stored if item.stored is None and is_channel(item.log_name)]
    states = [effect for call in batch for effect in call.effects if type(effect) is ChannelState]
    if pending or states:
        store_batch(hub, list(dict.fromkeys(pending)), states)  # a resend may be in the same batch
    effects: list[Effect] = []
    for call in batch:
        if call.stored:
            settle(hub, call)
        if call.effects and isinstance(call.effects[0], Redaction):
            remove_stored(hub, call, call.effects[0])
        effects += call.effects
        if call.replies or call.label:
            effects.append(Multicast([call.session], answers(call)))
    return effects


def settle(hub: Hub, call: Call) -> None:
    """Replaces all that a call does by an error if something of it could not be stored, and resends by receipts."""
    failed = False in [item.stored for item in call.stored]
    if failed:
        call.effects, call.replies = [], []
        call.reply_error(CommandError(FAIL_CANNOT_STORE, hub.storage_error or "try again"))
    for item in call.stored:
        if item.stored is None:  # not for the file
            item.stored = not failed
            if item.log_name and not failed:
                hub.private.append([(item.log_name, stored_form(item))])
        if item.original and not failed:  # it was stored before: only its sender gets that, as its receipt
            own = item.message.tags["msgid"]
            call.effects = [x for x in call.effects if not (type(x) is Broadcast and x.message is item.message)]
            call.replies = [x for x in call.replies if not (isinstance(x, Message) and x.tags.get("msgid") == own)]
            call.acknowledge(item.original)


def store_batch(hub: Hub, items: list[StoredMessage], states: list[ChannelState]) -> None:
    """Stores states of channels and messages, each with the token of a sender who may resend it, but for those that are
    stored already; or sets hub.storage_error."""
    hub.unsaved.update((state.channel, state) for state in states)
    messages = []
    try:
        known = hub.history.find([item.key for item in items if item.key])
        for item in items:
            message = stored_form(item)
            if item.key and known.setdefault(item.key, message) is not message:
                item.original = strip_private_tags(known[item.key])
            else:
                messages.append((item.log_name, message))
        hub.history.append(messages, list(hub.unsaved.values()))
        if hub.storage_error:
            log_later(logging.WARNING, "what is said can be stored again")
        hub.storage_error = ""
        hub.unsaved.clear()
    except StorageError as error:
        if not hub.storage_error:
            log_later(logging.ERROR, "cannot store what is said: %s", error)
        hub.storage_error = str(error)
    for item in items:
        item.stored = not hub.storage_error


def stored_form(item: StoredMessage) -> Message:
    """A message as the history keeps it."""
    message, tags = item.message, item.message.tags
    size = sum(map(len, itertools.chain(*tags.items()))) if len(tags) > 2 else 0
    if len(tags) > STORED_TAGS or size > STORED_TAG_CHARS:
        tags = {tag: value for tag, value in tags.items() if tag in ("time", "msgid", ID_TAG, LINES_TAG)}
    return message._replace(tags={**tags, BY_TAG: item.by})


def remove_stored(hub: Hub, call: Call, item: Redaction) -> None:
    """Removes a message from the history, and says whose it was in what the call tells others; or replaces all that by
    an error."""
    error, history = None, hub.history if is_channel(item.target) else hub.private
    try:
        found = history.fetch_all(item.logs, item.number - 1, item.number + 1, 1, True)
        if not found:
            error = CommandError(FAIL_UNKNOWN_MSGID, item.target, f"{item.number:x}")
        elif item.by not in ("", found[0].tags.get(BY_TAG)):
            error = CommandError(FAIL_REDACT_FORBIDDEN, item.target, f"{item.number:x}")
        else:
            history.remove(item.logs, item.number)
    except StorageError as failure:
        error = CommandError(FAIL_CANNOT_REMOVE, str(failure))
    if error:
        call.effects, call.replies = [], []
        call.reply_error(error)
        return
    author = {AUTHOR_TAG: found[0].nick}
    for effect in call.effects:
        if isinstance(effect, Broadcast):
            effect.message = effect.message._replace(tags={**effect.message.tags, **author})
    call.replies = [x._replace(tags={**x.tags, **author}) if isinstance(x, Message) else x for x in call.replies]


def prune(hub: Hub) -> None:
    """Removes some of what is too old from the history, and stores what could not be stored of channels."""
    if hub.unsaved:
        store_batch(hub, [], [])
    hub.history.prune()


def answers(call: Call) -> Sequence[Message | Lines]:
    """The replies of a call, with those of the history, and its label: on the only one, on the batch that they are, or
    on a batch around them; without any, an ACK (IRCv3 labeled-response)."""
    found: list[Message | Lines] = []
    for reply in call.replies:
        if isinstance(reply, (Message, Lines)):
            found.append(reply)
        elif call.session.send is not discard:  # it has a connection
            try:
                found += reply(call.hub.history)
            except StorageError:
                words = ("CHATHISTORY", "MESSAGE_ERROR", FAIL_MESSAGE_ERROR.text)
                found.append(Message("FAIL", words, call.hub.name))
    if not call.label:
        return found
    messages = [message for item in found for message in (item.messages() if isinstance(item, Lines) else [item])]
    if not messages:
        messages = [Message("ACK", (), call.hub.name)]
    is_batch = messages[0].command == "BATCH" and messages[0].param(0)[1:] == messages[-1].param(0)[1:]
    if len(messages) > 1 and not is_batch:
        messages = batch_of(("labeled-response",), call.hub.name, messages)
    return [messages[0]._replace(tags={**messages[0].tags, "label": call.label}), *messages[1:]]


class Feed:
    """The broadcasts of a batch that sessions get who are in the same of its channels."""

    __slots__ = ("_lines", "broadcasts")

    def __init__(self) -> None:
        self.broadcasts: list[Broadcast] = []
        self._lines: dict[Dialect, list[bytes]] = {}

    def lines(self, dialect: Dialect) -> list[bytes]:
        """They so far, encoded."""
        lines = self._lines.setdefault(dialect, [])
        if len(lines) < len(self.broadcasts):
            lines += [broadcast.encode(dialect) for broadcast in self.broadcasts[len(lines) :]]
        return lines


class Cursor:
    """What a session gets that is told more or less than others: lines so far, then its feed from `start` on."""

    __slots__ = ("feed", "lines", "start")

    def __init__(self, feed: Feed) -> None:
        self.feed, self.start = feed, 0
        self.lines: list[bytes] = []


class FanOut:
    """Applies the effects of a batch, and finds out which bytes go to whom.

    Nearly everybody is in one of the batch's channels and gets what is said there: a feed, encoded once for each
    dialect. Only a session that is in several of them, is sent something alone, is skipped, or joins, leaves or changes
    its dialect meanwhile has a cursor. So a batch costs a few steps for each effect, and for each usual recipient only
    the `send`.
    """

    def __init__(self, effects: list[Effect]) -> None:
        broadcasts = [effect for effect in effects if type(effect) is Broadcast]
        self._active = dict.fromkeys(channel for broadcast in broadcasts for channel in broadcast.channels)
        self._feeds: dict[frozenset[Channel], Feed] = {}  # by the active channels that a session is in
        # By channel, the feed of those first who are in no other.
        self._feeds_of: dict[Channel, list[Feed]] = {channel: [] for channel in self._active}
        self._cursors: dict[Session, Cursor] = {}
        for channel in self._active:
            self._feed((channel,))
        if len(self._active) > 1:
            self._find_overlap()
        for effect in effects:
            if isinstance(effect, Broadcast):
                self._broadcast(effect)
            elif isinstance(effect, Multicast):
                for session in effect.sessions:
                    lines, output = self._cursor(session).lines, session.output
                    for item in effect.messages:
                        lines.append(output.encode(item) if isinstance(item, Message) else output.encode_lines(item))
            elif isinstance(effect, Update):
                cursor = self._cursor(effect.session)
                effect.apply()
                cursor.feed = self._feed(effect.session.audiences)
                cursor.start = len(cursor.feed.broadcasts)

    def payloads(self) -> Iterator[tuple[bytes, Collection[Session], int]]:
        """The bytes, who gets them, and how many messages they are."""
        odd = self._cursors
        for channel in self._active:
            feed = self._feeds_of[channel][0]
            for dialect, group in channel.audience.items():
                sessions = [session for session in group if session not in odd] if odd else group
                if sessions:
                    lines = feed.lines(dialect)
                    yield b"".join(lines), sessions, len(lines)
        for session, cursor in odd.items():
            lines = cursor.feed.lines(session.output)[cursor.start :]
            lines = cursor.lines + lines if cursor.lines else lines
            yield b"".join(lines), (session,), len(lines)

    def _feed(self, channels: Iterable[Channel]) -> Feed:
        """The feed of who is in these channels."""
        key = frozenset(filter(self._active.__contains__, channels))
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = Feed()
            for channel in key:
                self._feeds_of[channel].append(feed)
        return feed

    def _find_overlap(self) -> None:
        """Gives a cursor to everybody who is in several of the channels."""
        seen: set[Session] = set()
        for channel in sorted(self._active, key=lambda channel: sum(map(len, channel.audience.values()))):
            for group in channel.audience.values():
                for session in seen.intersection(group):
                    self._cursor(session)
            for group in channel.audience.values():
                seen.update(group)

    def _cursor(self, session: Session) -> Cursor:
        """A session's cursor, up to here."""
        cursor = self._cursors.get(session)
        if cursor is None:
            cursor = self._cursors[session] = Cursor(self._feed(session.audiences))
        position = len(cursor.feed.broadcasts)
        if cursor.start < position:
            cursor.lines += cursor.feed.lines(session.output)[cursor.start :]
            cursor.start = position
        return cursor

    def _broadcast(self, broadcast: Broadcast) -> None:
        skipped = self._cursor(broadcast.skip) if broadcast.skip else None
        feeds = self._feeds_of[broadcast.channels[0]]
        if len(broadcast.channels) > 1:
            feeds = list(dict.fromkeys(feed for channel in broadcast.channels for feed in self._feeds_of[channel]))
        for feed in feeds:
            feed.broadcasts.append(broadcast)
        if skipped:
            skipped.start = len(skipped.feed.broadcasts)


# -----------------------------------------------------------------------------
# transports
# -----------------------------------------------------------------------------

# POSIX makes one call non-blocking on a blocking socket. Where that is missing (Windows) the socket itself is
# non-blocking, and readers wait in short steps, which they must there anyway: shutdown does not wake them.
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)
CRYPT_BYTES = 64 << 10  # text that is encrypted at once: so much waits for a slow peer beyond what its sender counts


class UntrustedPeer(OSError):
    """The other end is not who it should be."""


class TlsSocket:
    """A TLS connection (RFC 8446, RFC 5246) that looks like a socket: after `handshake`, it receives and sends text.

    One thread may receive while another one sends. OpenSSL lets only one of them in at a time, hence a lock, under
    which nothing waits. OpenSSL does not read from the socket itself, as it would not return while a peer floods it
    with key updates.
    """

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, server_side: bool = False, host: str = "", pin: str = ""
    ) -> None:
        """Takes over the socket. `pin`: the fingerprint that the peer's certificate must have."""
        import ssl

        self._ssl = ssl
        self._sock, self._pin = sock, pin
        self.fileno, self.close, self.setsockopt = sock.fileno, sock.close, sock.setsockopt
        self.settimeout, self.setblocking = sock.settimeout, sock.setblocking
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side, host or None)
        self._lock = threading.Lock()
        self._ready = False  # the handshake is done, and we know who is there
        self._closed = False  # we have said that nothing more will come
        self._ended = False  # the peer has said so
        self._text = b""  # came with the end of the handshake
        self._encrypted = 0  # bytes of text that are encrypted and not yet reported as sent
        self._unsent = b""  # what they became, as far as the socket did not take it

    def handshake(self) -> None:
        """Sets up TLS; waits for the peer as a socket does. Raises OSError, UntrustedPeer if it has not got the pin."""
        while not self._ready:
            try:
                self._object.do_handshake()
                self._check_pin()
                self._text = self._decrypt()
                self._sock.sendall(self._outgoing.read())
                self._ready = True
            except self._ssl.SSLWantReadError:
                self._sock.sendall(self._outgoing.read())
                data = self._sock.recv(RECV_BYTES)
                if not data:
                    raise ConnectionError("it ended the connection; perhaps it does not speak TLS") from None
                if data.startswith(b"ERROR :"):  # refused at the door
                    raise ConnectionError(data[7:].decode(errors="replace").strip()) from None
                self._incoming.write(data)
            except self._ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._sock.sendall(self._outgoing.read())  # an alert, which tells the peer why
                raise

    def recv(self, size: int, flags: int = 0) -> bytes:
        """The next text; b"" once the peer has ended its side; raises OSError, also where the connection was cut.

        Raises BlockingIOError if what came is no text yet, even on a blocking socket. So that afterwards select sees
        what is left, it returns all there is: up to a record, 16 KiB, more than `size`. Call it after the handshake
        before the first select. MSG_PEEK shows what is encrypted.
        """
        if flags & socket.MSG_PEEK:
            return self._sock.recv(size, flags)
        if not self._ready:
            raise OSError(errno.ENOTCONN, "TLS is not set up")
        text, self._text = self._text, b""
        if text or self._ended:
            return text
        data = self._sock.recv(size)
        if not data:
            raise ConnectionError("the connection was cut")
        with self._lock:
            self._incoming.write(data)
            try:
                text = self._decrypt()
            finally:
                with contextlib.suppress(OSError):  # what does not fit goes with the next text
                    self._flush()  # the answer to a key update, or an alert
        if not text and not self._ended:
            raise BlockingIOError(errno.EAGAIN, "no text yet")
        return text

    def send(self, data: bytes | bytearray, flags: int = 0) -> int:
        """Sends, without waiting, as much as the socket takes; returns how much that was. Raises OSError.

        Raises BlockingIOError if nothing more fits; the next call must begin with the same bytes.
        """
        with self._lock:
            if not self._ready or self._closed:
                raise OSError(errno.ENOTCONN, "TLS is not set up, or has ended")
            if not self._encrypted:
                self._encrypted = self._object.write(data[:CRYPT_BYTES])  # a copy: PyPy keeps views for a while
            self._flush()
            sent, self._encrypted = self._encrypted, 0
        return sent

    def shutdown(self, how: int) -> None:
        """Ends our side, which the peer is told, or both. Raises OSError.

        If no room is left to tell it, SHUT_WR puts that off to SHUT_RDWR.
        """
        with self._lock:
            if self._ready and not self._closed:
                self._closed = True
                with contextlib.suppress(self._ssl.SSLError):  # it always wants to hear the same from the peer
                    self._object.unwrap()
            with contextlib.suppress(OSError):
                self._flush()
            if how == socket.SHUT_RDWR or not self._unsent:
                self._sock.shutdown(how)

    def _decrypt(self) -> bytes:
        """What has arrived, as far as records are complete."""
        found = []
        with contextlib.suppress(self._ssl.SSLWantReadError):
            try:
                while not self._ended:
                    found.append(self._object.read(RECV_BYTES))
                    self._ended = not found[-1]
            except self._ssl.SSLZeroReturnError:
                self._ended = True
        return b"".join(found)

    def _flush(self) -> None:
        """Sends what is encrypted; raises BlockingIOError as long as that is not all sent."""
        self._unsent += self._outgoing.read()
        while self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent, DONTWAIT) :]

    def _check_pin(self) -> None:
        found = fingerprint_of(self._object.getpeercert(True) or b"") if self._pin else ""
        if not hmac.compare_digest(found, self._pin):
            raise UntrustedPeer(f"its fingerprint is {found}, not {self._pin}: somebody else may be listening there")


class _FrameError(Exception):
    """What was received breaks the rules; the arguments are those of close_frame."""


class WebSocket:
    """A WebSocket connection (RFC 6455) that looks like a socket, at the server's end: it receives messages as lines.

    `feed` is the protocol, without a socket. What is sent has frames already: see Framed. So that all is sent in one
    place, `control` is called with control frames that are to be sent, and True when the connection is to end by that;
    until its end, what comes is not read.
    """

    def __init__(
        self, sock: socket.socket | TlsSocket, limit: int, control: Callable[[bytes, bool], None], data: bytes = b""
    ) -> None:
        """Takes over the connection, of which `data` was received. `limit`: bytes of a message."""
        self._sock, self._limit, self._control = sock, limit, control
        self.fileno, self.close, self.send, self.shutdown = sock.fileno, sock.close, sock.send, sock.shutdown
        self.setsockopt = sock.setsockopt
        self.pongs, self.closing = b"", b""  # control frames to be sent
        self._received = data  # that is not fed yet
        self._tail = b""  # of a frame that is not complete
        self._message = bytearray()  # so far
        self._opcode = 0  # of the message that has begun
        self._ended = False

    def recv(self, size: int, flags: int = 0) -> bytes:
        """The next lines; as with TlsSocket.recv, all there are, and BlockingIOError where there is none."""
        if flags & socket.MSG_PEEK:
            return self._sock.recv(size, flags)
        if not self.closing:
            data, self._received = self._received or self._sock.recv(size), b""
            if not data:
                raise ConnectionError("the connection was cut")
            lines = self.feed(data)
            pongs, self.pongs = self.pongs, b""
            if pongs:
                self._control(pongs, False)
            if lines:
                return lines
        if self.closing and not self._ended:
            self._ended = True
            self._control(self.closing, True)
        elif self._ended and not self._sock.recv(size):  # a reset would eat our last frame
            return b""
        raise BlockingIOError(errno.EAGAIN, "no text yet")

    def feed(self, data: bytes) -> bytes:
        """The messages that are complete with `data`, a line each. May add to `pongs`, and set `closing`."""
        data, lines, start = self._tail + data, [], 0
        try:
            while not self.closing:
                found = self._parse(data, start)
                if not found:
                    break
                first, payload, start = found
                if first & 8:
                    self._obey(first & 15, payload)
                    continue
                self._opcode = first & 15 or self._opcode
                self._message += payload
                if first & 0x80:
                    lines.append(self.line_of(self._opcode, bytes(self._message)))
                    self._message.clear()
                    self._opcode = 0
        except UnicodeDecodeError:
            self.closing = close_frame(1007, "not UTF-8")
        except _FrameError as error:
            self.closing = close_frame(*error.args)
        self._tail = data[start:]
        return b"".join(lines)

    def _parse(self, data: bytes, start: int) -> tuple[int, bytes, int] | None:
        """A frame: its first byte, its payload, and where it ends; None while it is not complete (section 5.2)."""
        if len(data) < start + 2:
            return None
        first, size, at = data[start], data[start + 1] & 0x7F, start + 2
        opcode = first & 15
        if opcode & 8:
            good = opcode <= WS_PONG and first & 0x80 and size <= 125
        else:
            good = opcode <= WS_BINARY and bool(opcode) != bool(self._opcode)
        if not good or first & 0x70 or not data[start + 1] & 0x80:
            raise _FrameError(1002, "protocol error")
        if size > 125:
            at += 2 if size == 126 else 8
            if len(data) < at:
                return None
            size = int.from_bytes(data[start + 2 : at], "big")
        if not opcode & 8 and size + len(self._message) > self._limit:
            raise _FrameError(1009, "message too long")
        end = at + 4 + size
        if len(data) < end:
            return None
        mask = int.from_bytes((data[at : at + 4] * (size // 4 + 1))[:size], "big")
        return first, (int.from_bytes(data[at + 4 : end], "big") ^ mask).to_bytes(size, "big"), end

    def line_of(self, opcode: int, message: bytes) -> bytes:
        """A message as a line; raises UnicodeDecodeError."""
        if opcode == WS_TEXT:
            message.decode()
        return message.rstrip(b"\r\n").replace(b"\n", b" ") + b"\n"

    def _obey(self, opcode: int, payload: bytes) -> None:
        """Does what a control frame asks for (section 5.5)."""
        if opcode == WS_PING:
            self.pongs += frame(WS_PONG, payload)
        if opcode == WS_CLOSE:
            code = int.from_bytes(payload[:2], "big")
            known = 1000 <= code <= 1014 and code not in (1004, 1005, 1006) or 3000 <= code <= 4999
            if payload and not (known and len(payload) > 1):
                raise _FrameError(1002, "protocol error")
            payload[2:].decode()
            self.closing = frame(WS_CLOSE, payload[:2])


Transport = Union[socket.socket, TlsSocket, WebSocket]


def fingerprint_of(certificate: bytes) -> str:
    """The SHA-256 of a certificate in DER, as openssl writes it: AB:01:..."""
    return hashlib.sha256(certificate).digest().hex(":").upper()


def server_context(certificate: str, key: str) -> ssl.SSLContext:
    """What a server with these files, in PEM, encrypts with; raises OSError."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)  # which costs us more than who asks for it
    context.load_cert_chain(certificate, key or None)
    return context


def client_context(pinned: bool) -> ssl.SSLContext:
    """What a client encrypts with: it trusts whom the system trusts, or whoever has the right fingerprint."""
    import ssl

    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    if pinned:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def wait_for(readers: Sequence[Any], writers: Sequence[Any], seconds: float | None = None) -> list[Any]:
    """Waits until something can be read or written; returns what can. select takes only descriptors below 1024."""
    with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
        for sock in {*readers, *writers}:
            wanted = selectors.EVENT_READ * (sock in readers) | selectors.EVENT_WRITE * (sock in writers)
            selector.register(sock, wanted)
        return [key.fileobj for key, _ in selector.select(seconds)]


class Wakeup:
    """Lets any thread end another one's select, in which this is registered for reading."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.fileno = self._reader.fileno

    def wake(self) -> None:
        """Makes this readable. Any thread, and signal handlers; also after `close`."""
        with contextlib.suppress(OSError):  # full: it is readable
            self._writer.send(b"!")

    def clear(self) -> None:
        self._reader.recv(4096)

    def wake_on_signals(self) -> None:
        """Signals wake, too: Python runs their handlers only when a select has ended. For the main thread."""
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


# -----------------------------------------------------------------------------
# server
# -----------------------------------------------------------------------------

MAX_WATCHED = 500 if sys.platform == "win32" else 1 << 20  # select there takes 512 sockets
RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)  # SO_LINGER: close sends nothing more
BIND_ATTEMPTS = 10  # for a port that is free on all addresses of a name
TLS_ONLY = "This server speaks TLS only: client --fingerprint SHA256, as its operator sees it, or --tls"
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
FULL = "This server is full; try again later"


class ConnectionState:
    """What we still do on a connection; it only moves on. Mailer._move_on is the one place where it changes."""

    OPEN = 0  # send what there is
    DRAINING = 1  # send what is queued, at most DRAIN_S after the last progress, then end our side
    HALF_CLOSED = 2  # our side has ended: receive until the peer ends its own, at most CLOSE_GRACE_S after it has all
    CLOSED = 3  # nothing; its reader returns, and then the socket is closed


class Connection:
    """A session's socket. Its reader receives, the mailer alone sends, shuts down and closes."""

    __slots__ = (
        "deadline", "flooding_since", "in_flight", "reader_done", "recv_size", "sendq", "session", "sock", "state",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, session: Session) -> None:
        self.sock: Transport = sock  # changed by the reader, before anything that is secret
        self.session = session
        # The mailer's:
        self.sendq = bytearray()  # what the socket did not take
        self.state = ConnectionState.OPEN
        self.deadline = math.inf  # monotonic: until when it may stay in this state
        self.in_flight: float = math.inf  # bytes that the peer had not acknowledged when that was last asked
        self.reader_done = False
        # The reader's:
        self.recv_size = IDLE_RECV_BYTES
        self.flooding_since = 0.0  # monotonic: since when too much is unread

    def receive(self, flags: int = 0) -> bytes:
        """The next bytes; b'' at the end. Reader only. Raises OSError, BlockingIOError if what came is no text yet."""
        readable = bool(DONTWAIT)
        while self.state != ConnectionState.CLOSED:
            try:
                data = self.sock.recv(self.recv_size, flags)
            except BlockingIOError:
                if readable:
                    self.recv_size = RECV_BYTES  # it may be part of a large TLS record
                    raise
                readable = bool(select.select([self.sock], [], [], TICK_S)[0])
            else:
                self.recv_size = RECV_BYTES if len(data) > self.recv_size // 2 else IDLE_RECV_BYTES
                return data
        return b""

    def is_progressing(self) -> bool:
        """Whether the peer's system has acknowledged some of what is in flight since the last call, and not all."""
        before, self.in_flight = self.in_flight, 1  # on Windows it cannot be known
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                import fcntl
                import termios

                self.in_flight = int.from_bytes(fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return 0 < self.in_flight < before

    def unread_bytes(self) -> int:
        """How many bytes wait to be received, at most FLOOD_BYTES. Reader only."""
        try:
            return len(self.sock.recv(FLOOD_BYTES, socket.MSG_PEEK | DONTWAIT))
        except OSError:
            return 0


class Mailer:
    """Writes everything that is sent, in a thread of its own.

    Other threads may call add, reader_done and stop. The thread ends when it was stopped and all connections are
    closed, or STOP_S later; and after a defect, which `failed` and `on_failure` tell, for nobody would receive anything
    any more.
    """

    def __init__(self, hub: Hub, on_failure: Callable[[], None]) -> None:
        self._hub = hub
        self._on_failure = on_failure
        self.failed = False
        self.delivered = 0  # messages, counted once for each who was to get them
        self._wakeup = Wakeup()
        hub.wake = self._wakeup.wake
        self._selector = selectors.DefaultSelector()  # for connections with something queued
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._done: collections.deque[Connection] = collections.deque()  # whose readers have returned
        self._connections: dict[Session, Connection] = {}
        self._closing: set[Connection] = set()  # with a deadline
        self._check_at = self._prune_at = self._stop_at = 0.0  # monotonic
        self.thread = threading.Thread(target=self._run, name="mailer", daemon=True)

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: Connection) -> None:
        """Takes charge of a connection; before its session is known to the hub."""
        self._connections[connection.session] = connection
        self._bind(connection)

    def reader_done(self, connection: Connection) -> None:
        """The reader has returned: the peer has ended its side, or the connection is lost."""
        self._done.append(connection)
        self._wakeup.wake()

    def stop(self) -> None:
        """Delivers what can be delivered within STOP_S, closes all connections and waits for that."""
        self._stop_at = time.monotonic() + STOP_S
        self._wakeup.wake()
        self.thread.join(STOP_S + 1)

    def _run(self) -> None:
        try:
            self._work()
        except Exception:
            log_later(logging.ERROR, "the mailer failed\n%s", traceback.format_exc().rstrip())
            self.failed = True
            self._on_failure()
        self._hub.closed = True
        self._hub.drain_log()  # lets go of readers that wait
        self._hub.history.close()
        for connection in list(self._connections.values()):
            self._move_on(connection, ConnectionState.CLOSED)
            self._close(connection)
        self._selector.close()
        self._wakeup.close()

    def _work(self) -> None:
        while True:
            done = [self._done.popleft() for _ in range(len(self._done))]  # before the log, which has their last lines
            batch = self._hub.drain_log()
            if batch:
                self._deliver(commit(self._hub, batch))
            for connection in done:
                connection.reader_done = True
                self._move_on(connection, ConnectionState.DRAINING)
                if connection.state >= ConnectionState.HALF_CLOSED:
                    self._close(connection)
            now = time.monotonic()
            if now > self._prune_at:
                self._prune_at = now + PRUNE_S
                prune(self._hub)
            if self._closing and now > self._check_at:
                self._check_at = now + TICK_S / 5
                for connection in [connection for connection in self._closing if connection.deadline < now]:
                    if connection.state == ConnectionState.HALF_CLOSED and connection.is_progressing():
                        connection.deadline = now + DRAIN_S
                    else:
                        self._cut(connection)  # the peer does not close
            if self._stop_at and (not self._connections or now > self._stop_at):
                return
            timeout = TICK_S / 5 if self._closing or self._stop_at else PRUNE_S
            self._wait(0 if batch or done else timeout)

    def _wait(self, timeout: float) -> None:
        """Waits until it is woken, at most `timeout` seconds, and sends to who can take what is queued."""
        if timeout or len(self._selector.get_map()) > 1:
            for key, _ in self._selector.select(timeout):
                if key.data:
                    self._flush(key.data)
                else:
                    self._wakeup.clear()

    def _deliver(self, effects: list[Effect]) -> None:
        for data, sessions, count in FanOut(effects).payloads():
            self.delivered += count * len(sessions)
            size, flags = len(data), DONTWAIT
            for session in sessions if data else ():  # of a delivery's cost all but the system call is here
                try:
                    sent = session.send(data, flags)
                except OSError:
                    sent = 0
                if sent < size:
                    self._write(self._connections[session], data[sent:])
        for effect in effects:
            if type(effect) is Close and effect.session in self._connections:
                self._move_on(self._connections[effect.session], ConnectionState.DRAINING)

    def _bind(self, connection: Connection) -> None:
        """Sets `session.send`: the socket's own, once it is certain that nothing is queued."""
        session = connection.session
        if connection.state != ConnectionState.OPEN:
            session.send = discard
        elif connection.sendq or session.output is UNDECIDED:
            session.send = functools.partial(self._write, connection)
        else:
            session.send = connection.sock.send

    def _write(self, connection: Connection, data: bytes, flags: int = DONTWAIT) -> int:
        """Sends what the socket takes, and queues the rest. Returns the size of `data`, for all is taken care of."""
        if connection.state == ConnectionState.OPEN:
            sent = 0 if connection.sendq else self._send(connection, data)
            if sent < len(data) and connection.state == ConnectionState.OPEN:
                self._enqueue(connection, data[sent:])
            self._bind(connection)
        return len(data)

    def _send(self, connection: Connection, data: bytes | bytearray) -> int:
        """Sends what the socket takes, and returns how much that was."""
        try:
            return connection.sock.send(data, DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:  # its reader finds out, too
            self._move_on(connection, ConnectionState.CLOSED)
            return 0

    def _enqueue(self, connection: Connection, data: bytes) -> None:
        """Queues what the socket did not take. Drops the client if its send queue exceeds the limit."""
        if not connection.sendq and len(self._selector.get_map()) <= MAX_WATCHED:
            self._selector.register(connection.sock, selectors.EVENT_WRITE, connection)
        elif not connection.sendq or len(connection.sendq) + len(data) > self._hub.limits.outbox:
            log_later(logging.WARNING, "%s reads too slowly and is dropped", connection.session.description())
            self._hub.disconnect(connection.session, "Reads too slowly")  # before its reader can say otherwise
            self._cut(connection)
            return
        connection.sendq += data

    def _flush(self, connection: Connection) -> None:
        """Sends of what is queued as much as the socket takes."""
        sent = self._send(connection, connection.sendq)
        if not sent:
            return
        del connection.sendq[:sent]
        if connection.state == ConnectionState.DRAINING:
            connection.deadline = time.monotonic() + DRAIN_S
        if not connection.sendq:
            self._selector.unregister(connection.sock)
            if connection.state == ConnectionState.DRAINING:
                self._move_on(connection, ConnectionState.HALF_CLOSED)

    def _move_on(self, connection: Connection, state: int) -> None:
        """Moves a connection to a later state, and does what that means."""
        if state <= connection.state:
            return
        connection.state = state
        self._bind(connection)
        self._closing.add(connection)
        if state == ConnectionState.DRAINING:
            connection.deadline = time.monotonic() + DRAIN_S
            if not connection.sendq:
                self._move_on(connection, ConnectionState.HALF_CLOSED)
            return
        connection.deadline = time.monotonic() + CLOSE_GRACE_S
        if state == ConnectionState.CLOSED:
            self._closing.discard(connection)
            if connection.sendq:
                connection.sendq.clear()
                self._selector.unregister(connection.sock)
        with contextlib.suppress(OSError):  # the peer was faster
            connection.sock.shutdown(socket.SHUT_WR if state == ConnectionState.HALF_CLOSED else socket.SHUT_RDWR)
        if connection.reader_done:
            self._close(connection)

    def _cut(self, connection: Connection) -> None:
        """Ends a connection by a reset, lest a peer that does not read goes on waiting for us to do so, and the system
        for the peer."""
        with contextlib.suppress(OSError):
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._move_on(connection, ConnectionState.CLOSED)

    def _close(self, connection: Connection) -> None:
        if self._connections.pop(connection.session, None):
            self._closing.discard(connection)
            connection.sock.close()
            with self._hub:
                connection.session.address.release(connection.session)


class Server:
    """Listens on `host` and `port` (0: a free one); raises OSError or UnicodeError where that cannot be done.

    `serve` runs until `stop` is called from another thread or a signal handler, and cleans up.
    """

    def __init__(
        self,
        host: str,
        port: int,
        hub: Hub | None = None,
        context: ssl.SSLContext | None = None,
        tls_only: bool = False,
        web_origins: Collection[str] = (),
    ) -> None:
        self.listener = Listener(host, port)
        self.address: tuple[str, int] = self.listener.hosts[0], self.listener.port
        self._context, self.tls_only = context, tls_only
        self.web_origins = web_origins  # of pages that may talk to us, but for our own: https://chat.example.org
        self.hub = hub or Hub(SERVER_NAME)
        self._reasons = TokenBucket(REASONS, REASON_S)
        self.secret = secrets.token_bytes(16)  # hosts shown to others do not tell addresses
        self._wakeup = Wakeup()
        self.stop = self._wakeup.wake  # makes `serve` return
        self.mailer = Mailer(self.hub, self.stop)

    def serve(self) -> bool:
        """Accepts until stopped, then tells everybody, and returns within 5 s; False after a defect."""
        stack = threading.stack_size(STACK_BYTES)
        # The C library loads a file when a thread first ends, and aborts without a descriptor for it: let one end now.
        threading.Thread(target=bool).start()
        self.mailer.thread.start()
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._wakeup, selectors.EVENT_READ)
                for sock in self.listener.sockets:
                    selector.register(sock, selectors.EVENT_READ)
                ready: list[Any] = []
                while self._wakeup not in ready:
                    sys.setswitchinterval(max(SWITCH_S, len(self.hub.sessions) * SWITCH_CLIENT_S))
                    ready = [key.fileobj for key, _ in selector.select(self.hub.tick())]
                    for sock in filter(ready.__contains__, self.listener.sockets):
                        self._accept(sock)
        finally:
            threading.stack_size(stack)
            self.listener.close()
            self.hub.close("Server is shutting down")
            self.mailer.stop()
            self._wakeup.close()
        return not self.mailer.failed

    def figures(self) -> dict[str, float]:
        """What /stats and /metrics tell."""
        with self.hub as hub:
            return {
                "chat_people": sum(session.registered for session in hub.sessions),
                "chat_channels": len(hub.channels),
                "chat_connections": len(self.mailer),
                "chat_messages_total": hub.messages,
                "chat_deliveries_total": self.mailer.delivered,
                "process_resident_memory_bytes": resident_bytes(),
                "process_start_time_seconds": hub.started,
            }

    def _accept(self, listening: socket.socket) -> None:
        """Accepts those who wait, so that one address's storm of connections keeps nobody else waiting."""
        refused: set[str] = set()  # keys of addresses
        for _ in range(MAX_ACCEPTED):
            try:
                sock, address = listening.accept()
            except OSError as error:
                if error.errno in NO_DESCRIPTORS:
                    self.listener.refuse_without_descriptor(listening)
                break  # nobody waits, or it has gone already
            with self.hub:
                found = self.hub.access.address(address[0], self.hub.limits.per_address)
            if found.key in refused and not self._reasons.allow(time.monotonic()):
                sock.close()
            elif not self._admit(sock, found):
                refused.add(found.key)
        if refused:
            time.sleep(REJECT_PAUSE_S)

    def _admit(self, sock: socket.socket, address: Address) -> bool:
        """Lets a client in, or tells it why not."""
        limits = self.hub.limits
        with self.hub:
            full = FULL if len(self.mailer) >= limits.clients else ""
            why = full or self.hub.access.admit(address, limits.per_address)
            buckets = None if why else address.buckets(limits)
        if why:
            log_later(logging.WARNING, "refused %s: %s", address.key, why)
            reject(sock, why)
            return False
        with contextlib.suppress(OSError):  # it has gone already, as its reader will find out
            prepare(sock, limits)
        session = Session(shown_host(address.key, self.secret), time.monotonic(), address, buckets)
        if self.tls_only:  # nothing is sent in clear text
            session.stage = Stage.HANDSHAKING
        connection = Connection(sock, session)
        self.mailer.add(connection)
        self.hub.add(session, TLS_PROMPT_S if self._context else PROMPT_S)
        try:
            # Less than threading.Thread: 9,000 of those took 20 MB more, and 3 s more to join.
            _thread.start_new_thread(self._read, (connection,))
        except RuntimeError as error:  # can't start new thread
            log_later(logging.WARNING, "refused %s: %s", address.key, error)
            self.hub.disconnect(session, "", FULL)
            self.mailer.reader_done(connection)
        return True

    def _read(self, connection: Connection) -> None:
        """A reader thread: ends when its connection does."""
        session, lines = connection.session, TelnetBuffer(CLIENT_INPUT_BYTES)
        reason = ""
        try:
            data = self._receive(connection) if self._detect_transport(connection) else b""
            while data and connection.state != ConnectionState.CLOSED:
                session.last_received = time.monotonic()
                if session.dialect is UNDECIDED:  # as what the rest is to be read, the first line decides
                    line, end, data = data.partition(b"\n")
                    self._handle_data(connection, lines, line + end)
                if data:
                    self._handle_data(connection, lines, data)
                data = self._receive(connection)
            rest = lines.end()
            if rest and session.dialect.unended:
                handle_line(self.hub, session, rest)
        except OSError as error:  # reset, timed out
            reason = "Connection lost"
            log_later(logging.DEBUG, "%s: %s", session.description(), error)
        except Exception:  # a defect of ours must end one connection only
            log_later(logging.ERROR, "a reader failed\n%s", traceback.format_exc().rstrip())
            reason = "Internal error"
        finally:
            self.hub.disconnect(session, reason)
            self.mailer.reader_done(connection)

    def _detect_transport(self, connection: Connection) -> bool:
        """Finds out by the first byte whether a client speaks TLS, and sets that up. False where it cannot be."""
        session, sock = connection.session, connection.sock
        first = connection.receive(socket.MSG_PEEK)
        if first[:1] != bytes([TLS_HANDSHAKE]):
            line, end, _ = first.partition(b"\n")
            redirects = end and re.fullmatch(rb"[ -~]+\r?", line) and isinstance(dialect_of(line), Http)
            if first and self.tls_only and not redirects:
                begin(self.hub, session, line)
                self.hub.disconnect(session, "", TLS_ONLY)
            return True
        if not self._context:
            log_later(logging.WARNING, "refused %s: it speaks TLS, which is not set up here", session.address.key)
            return False
        self.hub.set_stage(session, Stage.HANDSHAKING, Stage.NEW)
        assert isinstance(sock, socket.socket)
        tls = connection.sock = TlsSocket(sock, self._context, True)
        tls.settimeout(HANDSHAKE_S)
        tls.handshake()
        tls.setblocking(bool(DONTWAIT))
        self.hub.set_stage(session, Stage.NEW, Stage.HANDSHAKING)
        return True

    def _receive(self, connection: Connection) -> bytes:
        while True:
            try:
                return connection.receive()
            except BlockingIOError:
                connection.session.last_received = time.monotonic()
                throttle(self.hub, connection)  # what is no text costs as much
                if connection.state != ConnectionState.OPEN:
                    time.sleep(DROPPED_PAUSE_S)

    def _handle_data(self, connection: Connection, buffer: TelnetBuffer, data: bytes) -> None:
        """Runs commands as they came. Bytes that are no line count as some, for the rate limit."""
        session = connection.session
        if isinstance(session.dialect, Http):
            handle_request(self, connection, session.dialect, data)
            return
        lines = buffer.feed_telnet(data) if isinstance(session.dialect, Plain) else buffer.feed(data)
        session.crlf = buffer.crlf
        if session.stage == Stage.NEW and buffer.begun:  # telnet introduces itself, and says nothing by that
            waits = not data.strip() and session.address.key in self.hub.access.browsers
            self.hub.set_stage(session, Stage.PROMPTED if waits else Stage.REGISTERING, Stage.NEW)
            if waits:
                send_raw(self.hub, session, PROMPT.text.encode())
        for _ in range(len(data) // LINE_BYTES - len(lines)):
            throttle(self.hub, connection)
        for line in lines:
            throttle(self.hub, connection)
            if session.stage == Stage.GONE:
                break
            handle_line(self.hub, session, line)
        if buffer.answers:
            send_raw(self.hub, session, bytes(buffer.answers))
            buffer.answers.clear()
        if session.stage == Stage.GONE:
            time.sleep(DROPPED_PAUSE_S)


def handle_request(server: Server, connection: Connection, dialect: Http, data: bytes) -> None:
    """Takes in some of an HTTP request, and answers it once it is complete. Whatever follows is ignored."""
    hub, session = server.hub, connection.session
    if session.stage == Stage.GONE:
        time.sleep(DROPPED_PAUSE_S)
        return
    try:
        rest = dialect.feed(data)
        if rest is None or not dialect.request:
            interim, dialect.interim = dialect.interim, b""
            if interim:
                send_raw(hub, session, interim)
            return
        answer = answer_request(server, connection, dialect, dialect.request, rest)
    except HttpError as error:
        answer = http_answer(error.status, error.text, **error.headers)
    if answer:
        if dialect.request and dialect.request.method == "HEAD":
            answer = answer[: answer.index(b"\r\n\r\n") + 4]
        send_raw(hub, session, answer, ends=True)


def answer_request(server: Server, connection: Connection, http: Http, request: Request, rest: bytes) -> bytes:
    """The answer to a request; b'' where what it does will answer it. Raises HttpError."""
    secured = isinstance(connection.sock, TlsSocket)
    if server.tls_only and not secured:
        raise HttpError(308, Location=f"https://{request.host or 'localhost'}/")
    request.check_host(secured, server.web_origins)
    use_forwarded_address(server, connection.session, request)
    name = request.path.rpartition("/")[2]
    if name not in RESOURCES:
        raise HttpError(404)
    allowed = ("GET", "HEAD", *([] if name else ["POST"]))
    if request.method not in allowed:
        raise HttpError(405, Allow=", ".join(allowed))
    if not name and "websocket" in request.items("Upgrade"):
        upgrade(server, connection, request, rest)
    elif request.method == "POST":
        say(server.hub, connection, http, http.registration(request))
    else:
        return RESOURCES[name](server, connection.session, request)
    return b""


def metrics(server: Server, session: Session) -> bytes:
    """The answer with the server's figures, as OpenMetrics 1.0; raises HttpError."""
    if not session.address.exempt and session.host != "localhost":
        raise HttpError(403)
    lines = []
    for name, value in server.figures().items():
        family, counts = re.subn("_total$", "", name)
        lines += [f"# TYPE {family} {'counter' if counts else 'gauge'}", f"{name} {value:.16g}"]
    return http_answer(200, "\n".join([*lines, "# EOF"]), "application/openmetrics-text; version=1.0.0")


def page(host: str) -> bytes:
    policy = page_policy().format(host or "localhost")
    return http_answer(200, PAGE.encode(), "text/html", Content_Security_Policy=policy)


# What GET is answered, by what follows the last slash of the path.
RESOURCES: dict[str, Callable[[Server, Session, Request], bytes]] = {
    "": lambda server, session, request: page(request.host),
    "chat.py": lambda server, session, request: http_answer(200, pathlib.Path(__file__).read_bytes()),
    "health": lambda server, session, request: http_answer(200, "ok"),
    "metrics": lambda server, session, request: metrics(server, session),
}


def use_forwarded_address(server: Server, session: Session, request: Request) -> None:
    """Counts who comes by a proxy of an exempt address as one of its own address. Raises HttpError if that may not."""
    hub, found = server.hub, session.address
    with hub:
        with contextlib.suppress(ValueError):  # what stands before something else comes from who knows whom
            for text in reversed(request.items("X-Forwarded-For")):
                found = hub.access.address(text, hub.limits.per_address) if found.exempt else found
        if found is session.address:
            return
        why = hub.access.admit(found, hub.limits.per_address)
        if not why:
            session.address.connections -= 1
            session.address, session.host = found, shown_host(found.key, server.secret)
            session.flood_bucket, session.nick_bucket = found.buckets(hub.limits) or (None, session.nick_bucket)
    if why:
        raise HttpError(429, why)


def say(hub: Hub, connection: Connection, http: Http, registration: list[Message]) -> None:
    """Says the lines of a body. The dialect makes the answer of the receipts."""
    session, lines = connection.session, [line.strip() for line in http.body.splitlines() if line.strip()]
    if not lines:
        raise HttpError(400, "there is no text to say")
    with hub:
        hub.not_full.wait()
        dispatch_all(hub, session, registration)
    for line in lines:
        if session.registered:
            throttle(hub, connection)
            handle_line(hub, session, line)
    hub.disconnect(session, OWN_REASON, "Goodbye")


def upgrade(server: Server, connection: Connection, request: Request, rest: bytes) -> None:
    """Goes on with WebSocket. Raises HttpError."""
    hub, session, protocol = server.hub, connection.session, request.subprotocol()
    send_raw(hub, session, request.handshake())
    session.opcode = WS_BINARY if protocol == SUBPROTOCOLS[1] else WS_TEXT
    with hub:
        call = Call(hub, session)
        call.set_dialect(irc() if protocol else UNDECIDED_WEB)
        hub.append(call)
    assert not isinstance(connection.sock, WebSocket)
    connection.sock = WebSocket(connection.sock, CLIENT_INPUT_BYTES, functools.partial(send_raw, hub, session), rest)


def throttle(hub: Hub, connection: Connection) -> None:
    """Rate limiting: waits until the next line is allowed; ends a session that goes on to send much more."""
    session, bucket = connection.session, connection.session.flood_bucket
    if not bucket:
        return
    now = time.monotonic()
    wait = bucket.debit(now)
    if not wait or connection.unread_bytes() < FLOOD_BYTES:
        connection.flooding_since = now
    elif now > connection.flooding_since + FLOOD_S:
        hub.disconnect(session, "Flooding", f"More than {hub.limits.rate:g} lines a second, without end")
        return
    while wait > 0 and session.stage != Stage.GONE:
        time.sleep(min(wait, TICK_S))
        wait -= TICK_S
        session.last_received = time.monotonic()


def shown_host(key: str, secret: bytes) -> str:
    """The host of an address, by its key, that others see."""
    if ipaddress.ip_address(key.partition("/")[0]).is_loopback:
        return "localhost"
    return hmac.new(secret, key.encode(), hashlib.sha256).hexdigest()[:10]


class Listener:
    """Listens on all addresses of `host`, with one port (0: a free one); raises OSError or UnicodeError."""

    def __init__(self, host: str, port: int) -> None:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        for attempt in range(BIND_ATTEMPTS):
            self.sockets: list[socket.socket] = []
            try:
                self._bind(addresses, port)
                break
            except OSError as error:
                self._close_sockets()
                if port or error.errno != errno.EADDRINUSE or attempt == BIND_ATTEMPTS - 1:
                    raise
        self.hosts: list[str] = [sock.getsockname()[0] for sock in self.sockets]
        self.port: int = self.sockets[0].getsockname()[1]
        self._reserve = io.FileIO(os.devnull)  # a descriptor to refuse a client with, when all are used

    def refuse_without_descriptor(self, listening: socket.socket) -> None:
        """Accepts one client with the descriptor kept in reserve, tells it and lets it go."""
        log_later(logging.WARNING, "refused a client: out of descriptors (ulimit -n)")
        with contextlib.suppress(OSError):
            self._reserve.close()
            reject(listening.accept()[0], FULL)
        try:
            self._reserve = io.FileIO(os.devnull)
        except OSError:
            time.sleep(0.05)  # none to be had even so: no use in asking again at once

    def close(self) -> None:
        self._close_sockets()
        self._reserve.close()

    def _bind(self, addresses: Sequence[tuple[int, Any]], port: int) -> None:
        """Binds what this machine has of the addresses; the first one chooses the port where that is 0."""
        for family, address in addresses:
            try:
                self.sockets.append(listen(family, (address[0], port, *address[2:]), len(addresses) == 1))
            except OSError as error:
                last = (family, address) == addresses[-1] and not self.sockets
                if last or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
            else:
                port = self.sockets[0].getsockname()[1]

    def _close_sockets(self) -> None:
        for sock in self.sockets:
            sock.close()


def listen(family: int, address: tuple[Any, ...], alone: bool) -> socket.socket:
    """A listening socket that no other program can take over; `alone`, one for :: takes IPv4 as well."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform == "win32":  # SO_REUSEADDR there means that anybody may share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not alone)
        sock.bind(address)
        sock.listen(4096)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def resident_bytes() -> float:
    """How much memory this process has; NaN where that is not known."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return math.nan


def prepare(sock: socket.socket, limits: Limits) -> None:
    """Sets up an accepted socket: blocking where a call can be told not to be; no delay; a lost peer is noticed."""
    sock.setblocking(bool(DONTWAIT))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    silence, patience = (min(max(seconds, 1), 30_000) for seconds in (limits.ping_s, limits.pong_s))
    if sys.platform == "win32":
        sock.ioctl(socket.SIO_KEEPALIVE_VALS, (1, int(silence * 1000), int(patience * 250)))
        return
    for name, value in (
        ("TCP_KEEPIDLE", silence),
        ("TCP_KEEPALIVE", silence),  # the same on macOS
        ("TCP_KEEPINTVL", max(patience / 4, 1)),
        ("TCP_USER_TIMEOUT", (silence + patience) * 1000),  # of what we sent and nobody acknowledges: Linux
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), int(value))


def reject(sock: socket.socket, why: str) -> None:
    """Tells a client that it cannot come in, and lets it go, without waiting for it."""
    with sock, contextlib.suppress(OSError):
        sock.setblocking(False)
        sock.send(f"ERROR :{why}\r\n".encode())  # readable in every dialect
        sock.shutdown(socket.SHUT_WR)
        sock.recv(RECV_BYTES)  # unread input would turn the close into a reset, which may overtake the line


def raise_descriptor_limit() -> None:
    """Lets the process open as many descriptors as the system permits it."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):  # macOS says unlimited and means less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# -----------------------------------------------------------------------------
# terminal
# -----------------------------------------------------------------------------
# A key is what a terminal sends for it: "a", "\x01" (Ctrl-A), "\x1b[A" (up), "\x1bb" (Alt-B): ECMA-48 and xterm.

PASTE_BEGIN, PASTE_END = "\x1b[200~", "\x1b[201~"  # bracketed paste, as xterm has it
BRACKETED_OFF = "\x1b[?2004l"
KEY_RE = re.compile(
    r"\x1b\[200~.*?\x1b\[201~"  # a paste, whole
    r"|\x1b\[\d+\$"  # rxvt, with Shift
    r"|\x1b\[M.{3}"  # a mouse report of X10
    r"|\x1b\[(?:\[|(?!\[|M|200~))[ -?]*(?:[@-~]|(?=[^ -~]))"  # CSI sequences, [[ in the Linux console; also broken off
    r"|\x1bO[0-?]*(?:[ -/@-~]|(?=[^ -~]))"  # SS3: arrows in application mode
    r"|(?P<answer>\x1b[]PX^_](?:[^\0-\x1f\x7f]{%d}|[^\0-\x1f\x7f]*"  # OSC, DCS, SOS, PM, APC strings, with their end
    r"(?:\x07|\x1b\\|(?=\x1b[^\\]|[\0-\x06\b-\x1a\x1c-\x1f\x7f]))))"  # or broken off by another control character
    r"|\x1b(?=[\x00-\x1f])|\x1b[^]\[OPX^_\x00-\x1f]"  # Esc alone; Alt and a key
    r"|[^\x1b]" % ANSWER_CHARS,
    re.DOTALL,
)
CANCEL = "\x07"  # Ctrl-G
ZERO_WIDTH = re.compile("[\u1160-\u11ff\u200c\u200d\U000e0020-\U000e007f]")  # Hangul vowels and finals; joiners; tags
# The end of a cluster: a character that is joined, or has a skin tone; the second half of a flag.
JOINED = re.compile(".*\u200d.|.+[\U0001f3fb-\U0001f3ff]|[\U0001f1e6-\U0001f1ff]{2}", re.DOTALL)
INDENT = 6  # columns of rows that continue a line; it begins with the time in them
CLUSTER_CHARS = 16  # at most; a couple with skin tones has 10, a letter with its marks 9
# What a terminal would send for keys without a character: by virtual key code of Windows, alone and with Ctrl.
WINDOWS_KEYS = {
    0x25: ("\x1b[D", "\x1b[1;5D"), 0x26: ("\x1b[A", "\x1b[A"), 0x27: ("\x1b[C", "\x1b[1;5C"),
    0x28: ("\x1b[B", "\x1b[B"), 0x23: ("\x1b[F", "\x1b[F"), 0x24: ("\x1b[H", "\x1b[H"), 0x2E: ("\x1b[3~", "\x1b[3~"),
}  # fmt: skip


def windows_keys(events: Iterable[tuple[int, int, int, int]]) -> str:
    """What a terminal would send for key events of the Windows console: whether down, virtual key code, UTF-16 code
    unit, state of the control keys (KEY_EVENT_RECORD). What comes at once and is several lines was pasted."""
    text = ""
    for down, key, unit, state in events:
        alt, ctrl, shift = state & 0x3, state & 0xC, state & 0x10
        if not down and not (key == 0x12 and unit):  # Alt let go, after the digits of a character
            continue
        if unit == 9 and shift:
            text += "\x1b[Z"
        elif unit:
            text += ("\x1b" if alt and down and not ctrl else "") + chr(unit)  # with Ctrl, it is AltGr
        elif key in WINDOWS_KEYS:
            text += WINDOWS_KEYS[key][bool(ctrl)]
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return f"{PASTE_BEGIN}{text}{PASTE_END}" if "\r" in text[:-1] else text


class KeyParser:
    """Splits what is read from a terminal into keys; an incomplete key waits for its rest."""

    def __init__(self) -> None:
        self._rest = ""
        self._dropping = False  # until the end of a paste that was too long

    def feed(self, text: str, pause: float = 0.0) -> list[str]:
        """Returns the keys that are complete now; PASTE_BEGIN alone stands for a paste that was too long.

        After a `pause` of KEY_S seconds the rest does not come any more: it was Esc alone, and not Alt.
        """
        if pause > KEY_S and not self._rest.startswith(PASTE_BEGIN):
            self._rest = ""
        text, at = self._rest + text, 0
        keys: list[str] = []
        while not text.startswith(PASTE_BEGIN, at) or text.find(PASTE_END, at) > 0:
            match = KEY_RE.match(text, at)
            if not match:
                break
            keys += [] if self._dropping or match["answer"] else [match[0]]
            at, self._dropping = match.end(), False
        self._rest = text[at:]
        if self._rest.startswith(PASTE_BEGIN) and len(self._rest) > PASTE_CHARS:
            keys += [] if self._dropping else [PASTE_BEGIN]
            self._dropping, self._rest = True, PASTE_BEGIN + self._rest[1 - len(PASTE_END) :]
        return keys


class Submission(NamedTuple):
    """What a person submits: a line, or the lines of a paste, in which slash commands are not looked for."""

    lines: list[str]
    pasted: bool = False


class LineEditor:
    """Edits the line that is being typed: keys in, text and cursor out. Knows nothing of screens.

    `complete` gets the text before the cursor and returns where the word to complete begins, and what could
    stand there.
    """

    def __init__(self, complete: Callable[[str], tuple[int, list[str]]]) -> None:
        self.text = ""
        self.cursor = 0  # in characters
        self._complete = complete
        self._candidates: list[str] = []  # what Tab puts before the cursor, one after the other
        self._pasted: list[str] = []  # pasted lines, while we ask about them
        self._query: str | None = None  # while the history is searched
        self._history: list[str] = []
        self._index = 0  # place in the history; its length for what is being typed
        self._draft = ""  # what was being typed, while something older is shown
        self._killed = ""
        self._is_kill = self._last_was_kill = False  # this key kills; so did the last one

    def view(self) -> tuple[str, str, int]:
        """(question that must be answered before typing goes on, or ''; text; cursor in characters)."""
        if self._pasted:
            return f"send {len(list(filter(str.strip, self._pasted)))} pasted lines? y/n ", "", 0
        return "" if self._query is None else f"search '{escape_controls(self._query)}': ", self.text, self.cursor

    def handle_key(self, key: str) -> Submission | None:
        """Carries out a key; returns what it submits. An unknown key does nothing."""
        if len(key) > 1 and key not in BINDINGS and not key.endswith(PASTE_END):
            return None
        if key == "\x03":
            self.clear()
            return None
        if self._pasted:
            lines, self._pasted = self._pasted, []
            if key in ("y", "Y"):
                return Submission(lines, True)
            self._history = [*self._history, *filter(str.strip, lines)][-HISTORY_LINES:]
            self._index = len(self._history)
            return None
        if self._query is not None and self._handle_search_key(key, self._query):
            return None
        self._last_was_kill, self._is_kill = self._is_kill, False
        if key not in ("\t", "\x1b[Z"):
            self._candidates = []
        if key in BINDINGS:
            return BINDINGS[key](self)
        if key.endswith(PASTE_END):
            self._paste(key[len(PASTE_BEGIN) : -len(PASTE_END)])
        elif unicodedata.category(key) != "Cc":
            self._insert(key)
        return None

    def is_busy(self) -> bool:
        """Whether something is being typed, or asked about."""
        return bool(self.text or self._pasted) or self._query is not None

    def clear(self) -> None:
        """Drops what is being typed."""
        self.text, self.cursor, self._pasted, self._query, self._candidates = "", 0, [], None, []
        self._index = len(self._history)

    def _enter(self) -> Submission | None:
        line, self.text, self.cursor = self.text, "", 0
        if line.strip() and self._history[-1:] != [line]:
            self._history = [*self._history, line][-HISTORY_LINES:]
        self._index = len(self._history)
        return Submission([line]) if line.strip() else None

    def _quit_or_delete(self) -> Submission | None:
        if not self.text:
            return Submission(["/quit"])
        self._remove("right")
        return None

    def _move(self, move: str) -> None:
        self.cursor += MOVES[move](self.text[: self.cursor], self.text[self.cursor :])

    def _insert(self, text: str) -> None:
        self.text = self.text[: self.cursor] + text + self.text[self.cursor :]
        self.cursor += len(text)

    def _remove(self, move: str, kill: bool = False) -> None:
        """Deletes what a move passes. A kill is kept for yank; kills in a row are kept together."""
        before = self.cursor
        self._move(move)
        start, end = sorted((before, self.cursor))
        gone, self.text, self.cursor = self.text[start:end], self.text[:start] + self.text[end:], start
        if kill and gone:
            known = self._killed if self._last_was_kill else ""
            self._killed = gone + known if start < before else known + gone
            self._is_kill = True

    def _paste(self, text: str) -> None:
        text = text.replace("\t", TAB).replace("\r\n", "\n").replace("\r", "\n").strip("\n")
        lines = text.split("\n")
        if len(list(filter(str.strip, lines))) > 1:
            self._pasted = lines
        else:
            self._insert("".join(filter(str.strip, lines)) or text)

    def _complete_word(self, step: int = 1) -> None:
        head, rest = self.text[: self.cursor], self.text[self.cursor :]
        if not self._candidates:
            start, words = self._complete(head)
            self._candidates = [head[:start] + word for word in words]
        if self._candidates:
            at = self._candidates.index(head) + step if head in self._candidates else min(step, 0)
            head = self._candidates[at % len(self._candidates)]
            self.text, self.cursor = head + rest, len(head)

    def _recall(self, at: int) -> None:
        if not 0 <= at <= len(self._history):
            return
        if self._index == len(self._history):
            self._draft = self.text
        self._index = at
        self.text = self._draft if at == len(self._history) else self._history[at]
        self.cursor = len(self.text)

    def _search(self) -> None:
        self._query = ""

    def _handle_search_key(self, key: str, query: str) -> bool:
        """Handles a key during a history search; returns False if it ends the search and is still to be carried out."""
        at = self._index
        if key == CANCEL:
            self._recall(len(self._history))
            self._query = None
            return True
        if key == "\x12":
            at -= 1
        elif key in ("\x7f", "\x08"):
            query, at = query[:-1], len(self._history) - 1
        elif len(key) == 1 and unicodedata.category(key) != "Cc":
            query += key
        else:
            self._query = None
            return False
        self._query = query
        for index in range(min(at, len(self._history) - 1), -1, -1):
            if query and query in self._history[index]:
                self._recall(index)
                self.cursor = self.text.index(query)
                break
        return True


WORD, FIELD = re.compile(r"[\W_]*[^\W_]*"), re.compile(r"\s*\S*")  # with what is between it and the cursor
# How far the cursor goes, by what stands before it and after it.
MOVES: dict[str, Callable[[str, str], int]] = {
    "left": lambda before, after: -len(clusters(before)[-1]),
    "right": lambda before, after: len(clusters(after)[0]),
    "home": lambda before, after: -len(before),
    "end": lambda before, after: len(after),
    "word left": lambda before, after: -next(WORD.finditer(before[::-1])).end(),
    "word right": lambda before, after: next(WORD.finditer(after)).end(),
    "field left": lambda before, after: -next(FIELD.finditer(before[::-1])).end(),
}
# What keys do.
BINDINGS: dict[str, Callable[[LineEditor], Submission | None]] = {
    **dict.fromkeys(("\r", "\n"), LineEditor._enter),
    **dict.fromkeys(("\x7f", "\x08"), lambda self: self._remove("left")),
    **dict.fromkeys(("\x01", "\x1b[H", "\x1bOH", "\x1b[1~", "\x1b[7~"), lambda self: self._move("home")),
    **dict.fromkeys(("\x05", "\x1b[F", "\x1bOF", "\x1b[4~", "\x1b[8~"), lambda self: self._move("end")),
    **dict.fromkeys(("\x02", "\x1b[D", "\x1bOD"), lambda self: self._move("left")),
    **dict.fromkeys(("\x06", "\x1b[C", "\x1bOC"), lambda self: self._move("right")),
    **dict.fromkeys(("\x1bb", "\x1b[1;5D", "\x1b[1;3D", "\x1bOd"), lambda self: self._move("word left")),
    **dict.fromkeys(("\x1bf", "\x1b[1;5C", "\x1b[1;3C", "\x1bOc"), lambda self: self._move("word right")),
    **dict.fromkeys(("\x10", "\x1b[A", "\x1bOA"), lambda self: self._recall(self._index - 1)),
    **dict.fromkeys(("\x0e", "\x1b[B", "\x1bOB"), lambda self: self._recall(self._index + 1)),
    "\x1b[3~": lambda self: self._remove("right"),
    "\x04": LineEditor._quit_or_delete,
    "\x0b": lambda self: self._remove("end", kill=True),
    "\x15": lambda self: self._remove("home", kill=True),
    "\x17": lambda self: self._remove("field left", kill=True),
    "\x1b\x7f": lambda self: self._remove("word left", kill=True),
    "\x1bd": lambda self: self._remove("word right", kill=True),
    "\x19": lambda self: self._insert(self._killed),
    "\t": LineEditor._complete_word,
    "\x1b[Z": lambda self: self._complete_word(-1),
    "\x12": LineEditor._search,
    "\x0c": lambda self: Submission(["/clear"]),
}
KEY_HELP = """\
Left, Right, Ctrl-B, Ctrl-F: move by a character
Ctrl-Left, Ctrl-Right, Alt-B, Alt-F: move by a word
Home, End, Ctrl-A, Ctrl-E: go to the beginning, the end
Backspace, Delete, Ctrl-D: delete before, under the cursor
Ctrl-U, Ctrl-K: cut all before, after the cursor
Ctrl-W: cut back to a space
Alt-Backspace, Alt-D: cut the word before, after it
Ctrl-Y: insert what was cut
Up, Down, Ctrl-P, Ctrl-N: older, newer line of yours
Ctrl-R: search them; again goes to an older
Ctrl-G: end the search
Tab, Shift-Tab: complete a name or a command
Ctrl-L: clear the screen
Enter: send
Ctrl-C: drop the line; on an empty one, leave, as does Ctrl-D"""

# Widths are the largest that terminals have: joined emoji are two columns in kitty and tmux, two each in xterm and VTE;
# and variation selector 16 makes its base wide in some. A row that is narrower than we think breaks nothing.


@functools.lru_cache(maxsize=4096)
def char_width(char: str) -> int:
    """How many columns of a terminal a character takes: 0, 1 or 2 (Unicode Standard Annex 11)."""
    if unicodedata.category(char) in ("Mn", "Me") or ZERO_WIDTH.match(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def text_width(text: str) -> int:
    """How many columns an escaped text takes, at most."""
    return len(text) if text.isascii() else sum(map(char_width, text)) + text.count("\ufe0f")


def clusters(text: str) -> list[str]:
    """Splits a text into grapheme clusters, roughly as UAX 29: a letter with its marks, joined emoji, a flag."""
    found = [text[:1]]
    for char in text[1:]:
        last = found[-1]
        extends = not char_width(char) or unicodedata.category(char) == "Mc" or JOINED.fullmatch(last + char)
        if extends and len(last) < CLUSTER_CHARS:
            found[-1] += char
        else:
            found.append(char)
    return found


def truncate(text: str, columns: int) -> str:
    """Cuts an escaped text to at most so many columns; where it is cut, it ends in dots."""
    if text_width(text) <= columns:
        return text
    parts = clusters(text)
    ends = list(itertools.accumulate(map(text_width, parts)))
    return "".join(parts[: bisect.bisect_right(ends, max(columns - 3, 0))]) + "..."[:columns]


def row_count(text: str, columns: int) -> int:
    """How many rows of so many columns an escaped text takes; a wide character is not broken."""
    rows, column = 1, 0
    for size in map(text_width, clusters(text)):
        if column + size > columns:
            rows, column = rows + 1, 0
        column += size
    return rows


def wrap(line: str, columns: int) -> str:
    """Breaks a painted line into rows of at most so many columns, between words, or else between clusters.

    All rows but the first are indented: only the program writes at the left, so no text passes for another line.
    """
    indent = " " * min(INDENT, columns // 2)
    rows, used, look, space = "", 0, "", columns - len(indent)
    for piece in re.findall(r"\x1b\[[\d;]*m| +|[^ \x1b]+", line):
        if piece[0] == "\x1b":
            rows, look = rows + piece, piece.replace("\x1b[0m", "")
            continue
        parts = [piece] if text_width(piece) <= space else clusters(piece)
        for part in itertools.chain.from_iterable([part] if text_width(part) <= space else part for part in parts):
            if used + text_width(part) > columns and part.strip():
                rows += f"\x1b[0m\n{indent}{look}" if look else f"\n{indent}"
                used = len(indent)
            rows += part if part.strip() else part[: columns - used]
            used = min(used + text_width(part), columns)
    return rows


def viewport(prompts: list[str], text: str, cursor: int, columns: int) -> tuple[str, str, str]:
    """Returns the first prompt that leaves room for typing, and what is shown of a text before and after the cursor.

    All three take at most so many columns. A text that is too long scrolls by half of what fits.
    """
    prompt = next(
        (item for item in prompts if text_width(item) <= columns * 2 // 3), truncate(prompts[-1], max(columns - 2, 0))
    )
    space = max(columns - text_width(prompt), 2)
    shown = escape_chars(text)
    starts = [0, *itertools.accumulate(map(text_width, shown))]
    first = 0
    if starts[cursor] > space:
        half = space // 2
        first = bisect.bisect_left(starts, -(-(starts[cursor] - space) // half) * half)
        while first < cursor and starts[first] == starts[first + 1]:  # marks belong to the letter before
            first += 1
    last = bisect.bisect_right(starts, starts[first] + space) - 1
    return prompt, "".join(shown[first:cursor]), "".join(shown[cursor:last])


if sys.platform == "win32":
    import ctypes
    import msvcrt

    TERMINAL_ERRORS = (OSError,)
    KERNEL32 = ctypes.windll.kernel32
    STDIN, STDOUT = KERNEL32.GetStdHandle(-10), KERNEL32.GetStdHandle(-11)

    class InputRecord(ctypes.Structure):
        """INPUT_RECORD, as far as it is a KEY_EVENT_RECORD."""

        _fields_ = (
            ("kind", ctypes.c_uint16), ("down", ctypes.c_int32), ("repeated", ctypes.c_uint16),
            ("key", ctypes.c_uint16), ("scan", ctypes.c_uint16), ("unit", ctypes.c_uint16), ("state", ctypes.c_uint32),
        )  # fmt: skip

    def console_mode(handle: int) -> int | None:
        """The mode of a console; None for what is none."""
        mode = ctypes.c_uint32()
        return mode.value if KERNEL32.GetConsoleMode(handle, ctypes.byref(mode)) else None

    def is_terminal(stream: Any) -> bool:
        """Whether a standard stream, perhaps None, is one; NUL calls itself a terminal, too."""
        return bool(stream and stream.isatty()) and console_mode(msvcrt.get_osfhandle(stream.fileno())) is not None

    def in_foreground() -> bool:
        """Whether the terminal is ours."""
        return True

    def can_draw() -> bool:
        """Whether the console understands VT sequences, which it is asked to do; not before Windows 10."""
        mode = console_mode(STDOUT)
        return mode is not None and bool(KERNEL32.SetConsoleMode(STDOUT, mode | 0x4))

    def raw_mode() -> Any:
        """Keys come singly and without echo, but for Ctrl-C; returns what to restore."""
        mode = console_mode(STDIN)
        KERNEL32.SetConsoleMode(STDIN, (mode or 0) & ~0x216 | 0x1)  # no lines, echo, mouse, VT input; Ctrl-C a signal
        return mode

    def restore_mode(modes: Any) -> None:
        """Gives the console back as it was."""
        KERNEL32.SetConsoleMode(STDIN, modes)

    def read_keys() -> str:
        """Waits for keys; '' when there will be no more."""
        records, count, text = (InputRecord * 256)(), ctypes.c_uint32(), ""
        while not text:
            events: list[tuple[int, int, int, int]] = []
            while not events or KERNEL32.WaitForSingleObject(STDIN, PASTE_MS) == 0:
                if not KERNEL32.ReadConsoleInputW(STDIN, records, len(records), ctypes.byref(count)):
                    return ""
                keys = (record for record in records[: count.value] if record.kind == 1)
                events += [(record.down, record.key, record.unit, record.state) for record in keys]
            text = windows_keys(events)
        return text

else:
    import termios

    DECODER = codecs.getincrementaldecoder("utf-8")("replace")

    TERMINAL_ERRORS = (OSError, termios.error)

    def is_terminal(stream: Any) -> bool:
        """Whether a standard stream, perhaps None, is one."""
        return bool(stream and stream.isatty())

    def in_foreground() -> bool:
        """Whether the terminal is ours; raises nothing: one that is gone, or that sends no signals, is nobody's."""
        try:
            return os.getpgrp() == os.tcgetpgrp(sys.stdin.fileno())
        except OSError:
            return False

    def can_draw() -> bool:
        """Whether the terminal understands VT sequences."""
        return os.environ.get("TERM", "dumb") != "dumb"

    def raw_mode() -> Any:
        """Keys come singly, unchanged and without echo, but for those that interrupt; returns what to restore."""
        saved = termios.tcgetattr(sys.stdin.fileno())
        modes = termios.tcgetattr(sys.stdin.fileno())
        modes[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.IXON | termios.ISTRIP)
        modes[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
        modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)  # in the background, reading fails instead of stopping us
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, modes)
        return saved

    def restore_mode(modes: Any) -> None:
        """Gives the terminal back as it was, also one that takes no output."""
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, modes)

    def read_keys() -> str:
        """Waits for keys; '' when there will be no more."""
        text = ""
        while not text:
            try:
                data = os.read(sys.stdin.fileno(), RECV_BYTES)
            except OSError:
                if not os.isatty(sys.stdin.fileno()):  # hung up
                    return ""
                time.sleep(TICK_S)  # in the background
                continue
            text = DECODER.decode(data)
            if not data:
                return ""
        return text


def encodable(text: str) -> str:
    """`text` as standard output will write it: what its encoding lacks is escaped, which takes more columns."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Terminal:
    """A person's terminal: a line is typed at its bottom, and what is printed scrolls away above that.

    Used by one thread. Within `with`, keys come singly and are not echoed. A thread reads them, and wakes `wakeup`:
    Windows cannot select on a console. For `complete`, see the editor.
    """

    def __init__(self, wakeup: Wakeup, complete: Callable[[str], tuple[int, list[str]]]) -> None:
        self.hung_up = False
        self._dumb = not can_draw()  # only goes on, and back in its row
        many = sys.platform == "win32" or "256color" in os.environ.get("TERM", "") or "COLORTERM" in os.environ
        self.colours = () if os.environ.get("NO_COLOR") or self._dumb else NAME_COLOURS if many else FEW_COLOURS
        self._wakeup = wakeup
        self._input: queue.Queue[tuple[str, float]] = queue.Queue(UNREAD_KEYS)  # with the seconds before it
        self._parser = KeyParser()
        self._editor = LineEditor(complete)
        self._suspending = False  # as soon as possible; the terminal is the shell's meanwhile
        self._clearing = False  # what is typed, as soon as possible
        self._printed: list[str] = []  # since the last draw
        self._rows = [""]  # ours, as drawn, the last one up to the character under the cursor
        self._last = ""  # the last row, whole
        self._shown: Any = None  # what was drawn last
        self._modes: Any = None

    def __enter__(self) -> Terminal:
        self._modes = raw_mode()
        self._wakeup.wake_on_signals()
        if sys.platform != "win32":
            signal.signal(signal.SIGTSTP, lambda *_: setattr(self, "_suspending", True))
            signal.signal(signal.SIGWINCH, lambda *_: None)  # wakes us
        self._write("" if self._dumb else "\x1b[?2004h")
        return self

    def __exit__(self, *exc: object) -> None:
        if sys.platform != "win32":
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        with contextlib.suppress(*TERMINAL_ERRORS):  # it may be gone
            self._write(f"{self._erased()}{''.join(self._printed)}{'' if self._dumb else BRACKETED_OFF}")
        self._rows, self._last, self._shown, self._printed = [""], "", None, []
        self.restore()
        self._modes = None

    def restore(self) -> None:
        """Gives the terminal back as it was, within `with`. Any thread."""
        with contextlib.suppress(*TERMINAL_ERRORS):
            if self._modes is not None:
                restore_mode(self._modes)

    def start(self) -> None:
        """Begins to read keys."""
        threading.Thread(target=self._read, daemon=True).start()

    def interrupt(self) -> bool:
        """Ctrl-C: has what is being typed cleared soon; False if there is nothing, or if that did not come to pass.
        For signal handlers."""
        if self._clearing or not self._editor.is_busy():
            return False
        self._clearing = True
        return True

    def submissions(self) -> Iterator[Submission]:
        """What has been entered meanwhile. Raises KeyboardInterrupt for Ctrl-C that the terminal makes no signal of."""
        if self._suspending:
            self._suspend()
        if self._clearing:
            self._editor.clear()
            self._clearing = False
        while not self._input.empty():
            text, pause = self._input.get()
            self.hung_up = not text
            for key in self._parser.feed(text, pause):
                if key == "\x03" and not self._editor.is_busy():
                    raise KeyboardInterrupt
                if key == PASTE_BEGIN:
                    self.print(f"*** Error: a paste of more than {PASTE_CHARS} characters is not taken")
                submission = self._editor.handle_key(key)
                if submission:
                    yield submission

    def paint(self, text: str, *codes: int | str) -> str:
        """`text` in a look (ECMA-48, Select Graphic Rendition), if colours are wanted."""
        return f"\x1b[{';'.join(map(str, codes))}m{text}\x1b[0m" if self.colours and text else text

    def print(self, line: str) -> None:
        """Prints a line above our rows at the next draw. A terminal that gets narrower may break its rows once more."""
        self._printed.append(wrap(encodable(line), self._size().columns - 1) + "\n")

    def bell(self) -> None:
        """Rings the bell at the next draw."""
        if "\a" not in self._printed:
            self._printed.append("\a")

    def clear(self) -> None:
        """Clears the screen at the next draw."""
        self._printed = ["\n" if self._dumb else "\x1b[H\x1b[2J"]

    def draft(self) -> str:
        """What is being typed, and not answered to a question."""
        question, text, _ = self._editor.view()
        return "" if question else text

    def draw(self, waiting: list[str], prompts: list[str]) -> None:
        """Draws our rows anew where something changed: lines that wait, cut to a row each, and the line being typed,
        behind the first prompt that fits."""
        size, (question, text, cursor) = self._size(), self._editor.view()
        waiting, prompts = list(map(encodable, waiting)), list(map(encodable, [question] if question else prompts))
        shown = (waiting, prompts, text, cursor, size)
        if shown == self._shown and not self._printed:
            return
        columns = max(size.columns - 1, 3)  # the last column stays free: terminals differ in what follows it
        most = 0 if self._dumb else max(min(size.lines - 2, WAITING_ROWS), 0)
        rows = [truncate(line, columns) for line in waiting[max(len(waiting) - most, 0) :]]
        prompt, before, after = viewport(prompts, text, cursor, columns)
        dim = [self.paint(line, DIM) + "\n" for line in rows]
        rest = after + "\b" * text_width(after) if self._dumb else f"\x1b7{after}\x1b8" if after else ""
        typing = self.paint(prompt, BOLD) + before + rest
        self._write("".join([self._erased(), *self._printed, *dim, typing]))
        self._rows, self._last = [*rows, prompt + before + after[:1]], prompt + before + after
        self._shown, self._printed = shown, []

    def _read(self) -> None:
        """A thread: ends when the terminal is gone."""
        text, last = "?", time.monotonic()
        while text:
            text, before = read_keys(), last
            last = time.monotonic()
            self._input.put((text, last - before))
            self._wakeup.wake()

    def _suspend(self) -> None:
        """Lets the shell have the terminal until it lets us go on."""
        self._suspending = False
        self.__exit__()
        if sys.platform != "win32":
            os.kill(0, signal.SIGTSTP)  # without a shell that could let us go on, this does nothing
        while not in_foreground() and is_terminal(sys.stdin):
            time.sleep(TICK_S)
        self.__enter__()

    def _erased(self) -> str:
        """The sequence that erases our rows, of which a terminal that became narrower has made several each."""
        columns = self._size().columns
        if self._dumb:
            return f"\r{' ' * text_width(self._last)}\r"
        above = sum(row_count(row, columns) for row in self._rows) - 1
        if above or row_count(self._last, columns) > 1:
            return f"\r\x1b[{above}A\x1b[J" if above else "\r\x1b[J"
        return "\r\x1b[K"  # of one row, because tmux keeps what is cleared with the whole screen

    @staticmethod
    def _size() -> os.terminal_size:
        size = os.get_terminal_size(sys.stdout.fileno())
        return os.terminal_size((size.columns or 80, size.lines or 24))  # a terminal may not know its own

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


# -----------------------------------------------------------------------------
# client
# -----------------------------------------------------------------------------


class FatalError(Exception):
    """Something that ends the program with exit code 1; its text says what and what to do."""


class PasswordRequired(FatalError):
    """The server asks for a password that was not given, or for another one."""


class Phase:
    """How far a connection to a server has come; later ones are greater."""

    OFFLINE, DIALING, REGISTERING, JOINING, IN, LEAVING = range(6)


def dial(host: str, port: int, context: ssl.SSLContext | None = None, pin: str = "") -> socket.socket | TlsSocket:
    """Connects, and shakes hands where there is a `context` for TLS; raises OSError or UnicodeError."""
    plain = connect(host, port)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock = TlsSocket(plain, context, False, host, pin) if context else plain
    try:
        if isinstance(sock, TlsSocket):
            sock.handshake()
    except OSError as error:
        sock.close()
        if isinstance(error, UntrustedPeer) or not getattr(error, "verify_message", ""):
            raise
        raise UntrustedPeer(error.verify_message) from None  # type: ignore[attr-defined]
    sock.setblocking(False)
    return sock


def connect(host: str, port: int) -> socket.socket:
    """A connection to the first address that takes one; on this machine, its IPv6 address is one of them."""
    try:
        return socket.create_connection((host, port), CONNECT_S)
    except ConnectionRefusedError:
        if host in ("localhost", "127.0.0.1"):
            with contextlib.suppress(OSError):
                return socket.create_connection(("::1", port), CONNECT_S)
        raise


class Uplink:
    """One connection to a server, and what is known of that server; made anew for each connection.

    A thread of its own dials. All else is done by the client's thread, and nothing waits.
    """

    def __init__(self, nick: str) -> None:
        self.phase = Phase.OFFLINE
        self.sock: Any = None
        self.dialed: Any = None  # what dialing came to: a socket, or an exception
        self.drained = True  # the last read found nothing
        self.nick = nick  # the one we have, or have asked for
        self.names_tried = 0  # which were taken
        self.userhost = ""  # user@host of ours, as others see it, as far as it is known
        self.caps: set[str] = set()  # granted; until then, wanted of those that are offered
        self.negotiated = False  # they are granted
        self.isupport: dict[str, str] = {}
        self.fold: Callable[[str], str] = fold  # as the server compares names
        self.error_text = ""  # the server's last words
        self.asked_id = ""  # of a message; the token of a PING
        self.unread = 0  # lines since the last answered PING, for a server that is not ours
        self._bucket = TokenBucket(FLOOD_BURST, FLOOD_INTERVAL_S)
        # Monotonic seconds: connected or in; something heard; PING sent; when to give up a JOIN or leaving.
        self.since = self.heard = self.ping_sent = self.deadline = 0.0
        self._lines = LineBuffer(SERVER_INPUT_BYTES)
        self._batches: dict[str, list[Message]] = {}  # reference -> a multiline batch that is open, and its lines
        self.sendq = bytearray()  # what the socket did not take yet

    @property
    def ours(self) -> bool:
        """Whether the server is a chat.py, which knows us again, and slows us down itself."""
        return RESUME_CAP in self.caps

    def dial(self, connect: Callable[[], Any], wakeup: Wakeup) -> None:
        """Begins to connect; `wakeup` tells when `dialed` is there."""

        def run() -> None:
            try:
                self.dialed = connect()
            except (OSError, UnicodeError) as error:
                self.dialed = error
            wakeup.wake()

        self.phase, self.since = Phase.DIALING, time.monotonic()
        threading.Thread(target=run, daemon=True).start()

    def register(self, sock: Any, password: str, granted: set[str], token: str) -> None:
        """Begins to register, on a new connection. A server that knows us by a token grants what it has granted before;
        it is told the token before it can find that our nick is taken."""
        self.sock, self.phase = sock, Phase.REGISTERING
        self.since = self.heard = time.monotonic()
        self.send("CAP", *(("REQ", " ".join(sorted(granted))) if granted else ("LS", "302")))
        if password:
            self.send("PASS", password)
        if granted:
            self.send("RESUME", token)
        self.send("NICK", self.nick)
        self.send("USER", re.sub("[^A-Za-z0-9._-]", "", self.nick)[:USER_CHARS] or "user", "0", "*", self.nick)
        if granted:
            self.send("CAP", "END")

    def wait(self, seconds: float, wakeup: Wakeup) -> None:
        """Waits until something can be received or sent, or another thread wakes us."""
        readers = [wakeup, self.sock] if self.sock else [wakeup]
        if wakeup in wait_for(readers, [self.sock] if self.sendq else [], max(seconds, 0)):
            wakeup.clear()

    def receive(self) -> list[Message]:
        """What has arrived; raises OSError when the connection has ended."""
        try:
            data = self.sock.recv(RECV_BYTES)
        except BlockingIOError:
            self.drained = True
            return []
        if not data:
            raise ConnectionError
        self.drained = False
        messages = (parse(line.decode(errors="replace")) for line in self._lines.feed(data) if line is not None)
        return [whole for whole in map(self._gather, messages) if whole is not NO_MESSAGE]

    def _gather(self, message: Message) -> Message:
        """The same message; NO_MESSAGE for a part of a multiline batch, but for its last, which stands for all. A line
        that is too much for us stays one."""
        mark, reference = message.param(0)[:1], message.param(0)[1:]
        is_batch = message.command == "BATCH" and reference != ""
        if is_batch and mark == "+" and message.param(1) == MULTILINE_CAP and len(self._batches) < OPEN_BATCHES:
            self._batches[reference] = [message]
            return NO_MESSAGE
        if is_batch and mark == "-" and reference in self._batches:
            first, *said = self._batches.pop(reference)
            lines = [Line(line.text, at > 0 and CONCAT_TAG in line.tags) for at, line in enumerate(said)]
            return join_lines(said[0]._replace(tags=first.tags), lines) if lines else NO_MESSAGE
        batch = self._batches.get(message.tags.get("batch", ""))
        if batch is None or is_system(message) or len(batch) > BATCH_LINES:
            return message
        if sum(len(line.text) for line in (*batch, message)) > BATCH_CHARS:
            return message
        batch.append(message)
        return NO_MESSAGE

    def send(self, command: str, *params: str, tags: Mapping[str, str] = NO_TAGS) -> None:
        """Queues a message, if there is a connection."""
        if self.sock:
            self.sendq += f"{format_tagged(Message(command, params, '', tags))}\r\n".encode(errors="surrogateescape")

    def say(self, message: Message, line_id: str) -> None:
        """Queues a message of ours; one of several lines as a batch (draft/multiline)."""
        tags = {ID_TAG: line_id} if "message-tags" in self.caps else NO_TAGS
        if LINES_TAG not in message.tags:
            self.send("PRIVMSG", *message.params, tags=tags)
            return
        self.send("BATCH", f"+{line_id}", MULTILINE_CAP, message.param(0), tags=tags)
        for line in split_lines(message):
            concat = {CONCAT_TAG: ""} if line.goes_on else {}
            self.send("PRIVMSG", message.param(0), line.text, tags={"batch": line_id, **concat})
        self.send("BATCH", f"-{line_id}")

    def ask_pong(self, line_id: str) -> None:
        """Asks whether what has been sent, up to a message that will not be echoed, has arrived."""
        self.asked_id = line_id
        self.send("PING", line_id)

    def flush(self) -> None:
        """Sends what the socket takes. That nothing can be sent any more shows when all that arrived has been read."""
        try:
            while self.sendq:
                del self.sendq[: self.sock.send(self.sendq)]
        except BlockingIOError:
            pass
        except OSError:
            self.sendq = bytearray()

    def allow(self, now: float) -> bool:
        """Whether one more line may go at the monotonic time `now`. Other servers throw out who speaks too fast."""
        if self.ours:
            return True
        if self.unread == UNREAD_WINDOW or not self._bucket.allow(now):
            return False
        self.unread += 1
        return True

    def is_me(self, nick: str) -> bool:
        """Whether a nick is ours."""
        return self.fold(nick) == self.fold(self.nick)

    def learn_userhost(self, source: str) -> None:
        """Takes our user and host from a source, if they are not longer than they can be."""
        userhost = source.partition("!")[2]
        self.userhost = userhost if len(userhost) < NAME_CHARS else ""

    def limit(self, token: str, default: int, most: int) -> int:
        """A number that the server's RPL_ISUPPORT gives, at most `most`."""
        value = self.isupport.get(token, "")
        return min(int(value), most) if re.fullmatch("[1-9][0-9]{0,4}", value) else default

    def close(self) -> None:
        """Ends the connection; waits a moment for the socket to take what was sent."""
        self.phase = Phase.OFFLINE
        if self.sock is None:
            return
        self.flush()
        if self.sendq:
            wait_for([], [self.sock], CLOSE_S)
            self.flush()
        with contextlib.suppress(OSError):  # the peer was faster
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.sock = None
        self.sendq.clear()


class SendState:
    """What is known of a message of ours, as long as it has not been acknowledged."""

    QUEUED = 0  # not sent over this connection
    SENT = 1  # its echo will acknowledge it
    UNCONFIRMED = 2  # sent to a server that does not echo: a PING, once answered, acknowledges it


@dataclasses.dataclass
class Pending:
    """A message of ours that has not been acknowledged."""

    target: str
    text: str
    lines: str = ""  # LINES_TAG of a text of several lines
    state: int = SendState.QUEUED
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))  # which nobody can guess

    def size(self) -> int:
        """About how many bytes are sent for it."""
        return len(self.text.encode(errors="replace")) + LINE_OVERHEAD * (1 + self.lines.count(","))

    def message(self, nick: str) -> Message:
        """As others will get it from us."""
        return Message("PRIVMSG", (self.target, self.text), nick, {LINES_TAG: self.lines} if self.lines else NO_TAGS)


class SendQueue:
    """Our unacknowledged messages, in order. With echo-message each echo is an ack; without it, an answered PING acks
    everything sent before it."""

    def __init__(self) -> None:
        self.messages: list[Pending] = []
        self.sent = 0  # of them are SENT or UNCONFIRMED: the first ones
        self.resent = False  # some of them were sent over a connection that is lost
        self.last_progress = time.monotonic()  # something was added, or acknowledged

    def __len__(self) -> int:
        return len(self.messages)

    def add(self, target: str, text: str, lines: str = "") -> None:
        """Queues a message."""
        self.last_progress = time.monotonic()
        self.messages.append(Pending(target, text, lines))

    def having(self, state: int) -> list[Pending]:
        """Those in a state."""
        return [pending for pending in self.messages if pending.state == state]

    def unanswered(self) -> int:
        """About how many bytes were sent, of messages that are not acknowledged."""
        return sum(pending.size() for pending in self.messages[: self.sent])

    def next(self, multiline: bool) -> Pending:
        """The first that is QUEUED, which is SENT now; of one of several lines the first where `multiline` is wrong."""
        pending = self.messages[self.sent]
        if pending.lines and not multiline:
            lines = [Pending(pending.target, line.text) for line in each_line(pending.message(""))]
            self.messages[self.sent : self.sent + 1] = lines
            pending = lines[0]
        self.sent += 1
        pending.state = SendState.SENT
        return pending

    def redirect(self, old: str, new: str) -> None:
        """What has not been sent to one channel goes to another one."""
        for pending in self.messages:
            if pending.state == SendState.QUEUED and pending.target == old:
                pending.target = new

    def acknowledge(self, line_id: str) -> None:
        """The message with this id has arrived."""
        self._remove(lambda pending: pending.id == line_id)

    def acknowledge_first(self, target: str, fold: Callable[[str], str]) -> bool:
        """Something came of the first sent message to `target`, or to anybody where that is ''; False for none."""
        key = fold(target)
        return self._remove(
            lambda pending: (
                pending.state != SendState.QUEUED
                and (not target or key in (fold(pending.target), fold(safe_param(pending.target))))
            )
        )

    def acknowledge_until(self, line_id: str) -> bool:
        """A PING with the id of an unconfirmed message was answered: it and all before it have arrived."""
        return self._remove(lambda pending: (pending.id, pending.state) == (line_id, SendState.UNCONFIRMED), True)

    def requeue(self) -> int:
        """The connection is lost: what was not echoed will be sent again. Returns how many messages may be lost."""
        lost = len(self.having(SendState.UNCONFIRMED))
        self.messages = [pending for pending in self.messages if pending.state != SendState.UNCONFIRMED]
        self.sent = 0
        for pending in self.having(SendState.SENT):
            pending.state, self.resent = SendState.QUEUED, True
        return lost

    def _remove(self, concerned: Callable[[Pending], bool], and_before: bool = False) -> bool:
        for index, pending in enumerate(self.messages):
            if concerned(pending):
                first = 0 if and_before else index
                del self.messages[first : index + 1]
                self.sent -= max(min(self.sent, index + 1) - first, 0)
                self.last_progress = time.monotonic()
                return True
        return False


class HistorySync:
    """A CHATHISTORY request for a room (draft/chathistory), until the last page of its answer is there."""

    def __init__(self, missed: bool, most: int) -> None:
        self.missed = missed  # asks for what we missed, page by page; otherwise for the last lines before we came
        self.most = most  # messages of a page
        self.asked = time.monotonic()
        self.pages = 0
        self.batch = ""  # the page's reference
        self.page: list[Message] = []
        self.held: list[Message] = []  # what was said meanwhile
        self.overflowed = False  # more was said, which is to be asked for


class Room:
    """A channel that we are in."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: dict[str, str] = {}  # folded nick -> nick; who spoke last, last
        self.unread = 0  # messages since we last spoke here
        self.quiet = False  # we may not tell that we type here, as long as we have not spoken
        self.own = ""  # msgid of what we said last
        self.last = ""  # a reference to the last message, or to when we came (draft/chathistory)
        self.sync: HistorySync | None = None


class Rooms:
    """Our rooms, and where we speak. We were put out of the room `active` if it is not one of `joined`."""

    def __init__(self, channel: str, fold: Callable[[str], str]) -> None:
        self.active = channel  # where we speak
        self.pending = channel  # the channel that we have asked to join, to speak there; '' for none
        self.joined: dict[str, Room] = {}  # folded name -> room
        self.rejoin: dict[str, Room] = {}  # the same for those of the last connection, until we are in again
        self.fold = fold  # as the server compares names

    def get(self, name: str) -> Room | None:
        """The room of this name, if we are in it."""
        return self.joined.get(self.fold(name))

    def others(self) -> list[Room]:
        """The rooms in which we do not speak."""
        here = self.fold(self.active)
        return [room for key, room in self.joined.items() if key != here]

    def is_elsewhere(self, message: Message) -> bool:
        """Whether a message is about a channel in which we do not speak."""
        target = message.param(0)
        return message.command != "QUIT" and is_channel(target) and self.fold(target) != self.fold(self.active)

    def syncing(self) -> list[Room]:
        """The rooms for which an answer about the past is waited for."""
        return [room for room in self.joined.values() if room.sync]

    def meet(self, room: Room, nick: str) -> None:
        """Somebody is in a room."""
        if len(nick) < NAME_CHARS and sum(len(one.members) for one in self.joined.values()) < MAX_MEMBERS:
            room.members.setdefault(self.fold(nick), nick)

    def switch(self, room: Room) -> None:
        """Speaks in a room from now on."""
        self.active, self.pending, room.unread = room.name, "", 0

    def refold(self) -> None:
        """`fold` has changed."""
        self.joined = {self.fold(room.name): room for room in self.joined.values()}
        for room in self.joined.values():
            room.members = {self.fold(nick): nick for nick in room.members.values()}
        self.rejoin = {self.fold(room.name): room for room in self.rejoin.values()}

    def lose(self) -> None:
        """The connection is lost: all rooms are to be joined again."""
        self.rejoin = dict([*self.rejoin.items(), *self.joined.items()][-MAX_ROOMS:])
        self.joined = {}
        for room in self.rejoin.values():
            room.members, room.sync = {}, None
        if not self.pending and self.fold(self.active) in self.rejoin:
            self.pending = self.active


class Typing:
    """Who is about to say something, as far as they tell (+typing, IRCv3's client-only tag): others, and we."""

    def __init__(self) -> None:
        self.others: dict[str, tuple[str, str, float]] = {}  # folded nick -> nick, target, until when (monotonic)
        self.wanted = True  # we tell it
        self.draft = ""  # of ours, when we last looked
        self._changed = self._told = 0.0  # monotonic: the draft; that we are typing
        self._state = "done"  # as they know it

    def hear(self, nick: str, key: str, target: str, state: str) -> None:
        """Somebody tells it; `key` is their folded nick."""
        self.others.pop(key, None)
        if state == "active" and len(nick) < NAME_CHARS and len(self.others) < NAMES_SHOWN:
            self.others[key] = nick, target, time.monotonic() + TYPING_HEARD_S

    def step(self, draft: str, now: float) -> str:
        """What we are to tell now: 'active', 'paused' or 'done'; '' for nothing."""
        self.others = {key: other for key, other in self.others.items() if now < other[2]}
        if draft != self.draft:
            self.draft, self._changed = draft, now
        state = "done" if not draft else "active" if now < self._changed + PAUSED_S else "paused"
        due = now >= self._told + TYPING_S if state == "active" else self._state not in ("done", state)
        if not due:
            return ""
        self._told = now if state == "active" else self._told
        self._state = state
        return state

    def is_active(self) -> bool:
        """Whether something is to be done or shown soon without anything new."""
        return bool(self.others) or self._state == "active"

    def reset(self) -> None:
        """The draft was sent, which tells enough."""
        self.draft, self._state = "", "done"


class SeenIds:
    """The last msgids, so that a message is shown once."""

    def __init__(self) -> None:
        self.ids: dict[str, None] = {}

    def add(self, msgid: str) -> bool:
        """Whether the id is new, as one that is empty or too long always is."""
        if msgid in self.ids:
            return False
        if 0 < len(msgid) < NAME_CHARS:
            self.ids[msgid] = None
            if len(self.ids) > SEEN_IDS:
                del self.ids[next(iter(self.ids))]
        return True


class UserInterface:
    """What a client shows, and where its lines come from: to be overridden. Called by the client's thread."""

    patient = True  # goes on when a message is refused
    ended = False  # no more lines will come

    def start(self) -> None:
        """We are in the chat, for the first time: lines may come. Whoever reads them wakes client.wakeup."""

    def update(self) -> None:
        """Takes the lines that have come, and shows what has changed."""

    def show(self, message: Message, mine: bool) -> None:
        """Shows a message that arrived; `mine`: an acknowledged one of ours."""

    def show_status(self, text: str) -> None:
        """Shows something that the client itself has to say."""

    def on_names(self) -> None:
        """We are in a room, and know who is there."""

    def clear(self) -> None:
        """Empties the screen."""


class Client:
    """One person's, or one pipe's, place in a chat. `run` is a loop of one thread, which owns all state."""

    def __init__(self, host: str, port: int, nick: str, channel: str) -> None:
        self.where = f"{host}:{port}"
        self.dial: Callable[[], Any] = functools.partial(dial, host, port)
        self.desired_nick = nick
        self.password = ""
        self.reconnects = True
        self.wanted_caps: set[str] = WANTED_CAPS
        self.replay = 0  # lines that are shown of what was said before we came
        self.multiline = (0, 0)  # bytes and lines of a message of several lines, at most (draft/multiline)
        self.keys: dict[str, str] = {}  # folded name -> key of a channel that wants one
        self.ui: UserInterface = UserInterface()
        self.wakeup = Wakeup()
        self.interrupted = False  # set by any thread or signal handler, which then wakes us
        self.uplink = Uplink(nick)
        self.rooms = Rooms(channel, self.fold)
        self.queue = SendQueue()
        self.seen = SeenIds()
        self.typing = Typing()
        self.token = secrets.token_hex(16)  # by which a chat.py server knows us again
        self.granted: set[str] = set()  # the capabilities that one has granted: asked for at once the next time
        self.ignored: dict[str, str] = {}  # folded nick -> nick of those whose messages are not shown
        self.last_private_sender = ""
        self.who: list[str] | None = None  # that RPL_WHOREPLY has told, as long as that is asked for
        self.entered = False  # has been in the chat
        self.attempts = 0  # to connect, in vain
        self.retry_at = 0.0  # monotonic
        self.status: int | None = None  # exit code, once known

    def run(self) -> int:
        """Talks until one side ends; returns the exit code, raises FatalError."""
        try:
            while self.status is None:
                self.uplink.wait(self.pause(time.monotonic()), self.wakeup)
                self.turn(time.monotonic())
            return self.status
        except KeyboardInterrupt:
            return 130
        finally:
            if self.status is None:  # nor have we said goodbye: the server would keep our name for us
                self.uplink.send("QUIT")
            self.uplink.close()

    def pause(self, now: float) -> float:
        """Seconds until something is due, if nothing happens before."""
        uplink = self.uplink
        if uplink.sock and not uplink.drained or self.can_send() and uplink.ours and not uplink.sendq:
            return 0
        if uplink.phase == Phase.OFFLINE:
            return math.modf(self.retry_at - now)[0]  # for each second that is shown
        waits = self.queue or self.rooms.pending or self.ui.ended or self.rooms.syncing() or self.typing.is_active()
        if uplink.phase == Phase.IN and not waits:
            return max(uplink.heard, uplink.ping_sent) + ASK_S - now
        return CLIENT_TICK_S

    def turn(self, now: float) -> None:
        """Does what can be done now, without waiting."""
        uplink = self.uplink
        if self.interrupted:
            raise KeyboardInterrupt
        if uplink.phase == Phase.DIALING and uplink.dialed is not None:
            self.on_dialed(uplink.dialed)
        if uplink.sock:
            try:
                messages = uplink.receive()
            except OSError as error:
                self.on_closed(error)
            else:
                uplink.heard = time.monotonic() if messages else uplink.heard
                for message in messages:
                    if uplink.sock and not hold_back(self, message):  # one may make us give up the connection
                        self.handle(message)
        if self.status is None:
            check_deadlines(self, now)
        if self.status is None:
            self.flush_queue()
            self.ui.update()
        self.uplink.flush()

    def connect(self) -> None:
        """Begins a new connection."""
        self.uplink = Uplink(self.desired_nick)
        self.uplink.dial(self.dial, self.wakeup)

    def on_dialed(self, result: Any) -> None:
        """Dialing has come to a socket, or to an exception."""
        if isinstance(result, UntrustedPeer):
            hint = "" if "fingerprint" in str(result) else "; its own terminal may show one to give as --fingerprint"
            raise FatalError(f"{self.where} cannot be trusted, so nothing was sent: {result}{hint}")
        if isinstance(result, Exception):
            self.lose(f"cannot connect to {self.where}: {connect_error(result, self.where.rpartition(':')[0])}")
        else:
            self.uplink.register(result, self.password, self.granted, self.token)

    def handle(self, message: Message) -> None:
        """Does what a message means, and shows it if that does not say that it need not be seen."""
        self.typing.others.pop(self.fold(message.nick), None)
        handler = on_join_error if is_join_error(self, message) else HANDLERS.get(message.command)
        if not (handler and handler(self, message)):
            self.ui.show(message, False)

    def on_closed(self, error: OSError) -> None:
        """The connection has ended."""
        text, reason = self.uplink.error_text, error.strerror or str(error)
        if self.entered:
            self.lose(f"the connection to {self.where} was lost: {text or reason or 'it was closed'}")
        else:
            self.lose(f"{self.where} closed the connection: {text or (reason or 'at once') + '; is it a chat server?'}")

    def lose(self, reason: str) -> None:
        """Goes offline, to connect again later; or ends, where that makes no sense."""
        phase, hopeless = self.uplink.phase, not self.entered or not self.reconnects or is_banned(self.uplink)
        self.uplink.close()
        if phase == Phase.LEAVING:
            self.end()
            return
        if hopeless:
            raise FatalError(reason)
        now = time.monotonic()
        if phase == Phase.IN:
            limit = "" if self.ui.patient else f", for {GIVE_UP_S:.0f} s after the end of the input"
            self.ui.show_status(f"{reason}; trying again{limit}")
            if now > self.uplink.since + RETRY_MAX_S:
                self.attempts = 0
        self.rooms.lose()
        lost = self.queue.requeue()
        if lost:
            self.ui.show_status(f"your last {plural(lost, 'line')} may be lost: this server confirms nothing")
            if not self.ui.patient:
                raise FatalError("it is not known whether all lines were delivered")
        self.retry_at = now + min(RETRY_S * 2**self.attempts, RETRY_MAX_S) * random.uniform(0.7, 1)
        self.attempts = min(self.attempts + 1, 10)

    def leave(self, reason: str = "") -> None:
        """Ends the chat, as soon as the server has said goodbye."""
        uplink = self.uplink
        uplink.send("QUIT", *([reason] if reason else []))
        if uplink.phase == Phase.IN:
            uplink.phase, uplink.deadline = Phase.LEAVING, time.monotonic() + GOODBYE_S
        elif uplink.phase != Phase.LEAVING:
            self.end()

    def end(self) -> None:
        """Leaves at once."""
        if self.queue:
            raise FatalError(f"not delivered: {plural(len(self.queue), 'line')}")
        self.status = 0

    def enter(self, text: str, commands: bool) -> None:
        """Takes a line of input, in which slash commands may be meant as such."""
        text = re.sub("[\0\r\n]", " ", text)
        try:
            here = self.rooms.pending or self.rooms.active
            message = parse_input(text, here, True) if commands else Message("PRIVMSG", (here, text))
        except CommandError as error:
            self.ui.show_status(f"Error: {error.params[0]}")
            return
        LOCAL_COMMANDS.get(message.command, send_command)(self, message)

    def flush_queue(self) -> None:
        """Sends what is queued, once we are in the chat and know what was said there, as fast as the server allows."""
        uplink, queue = self.uplink, self.queue
        while self.can_send() and len(uplink.sendq) < SENDQ_LOW and uplink.allow(time.monotonic()):
            pending = queue.next(MULTILINE_CAP in uplink.caps)
            uplink.say(pending.message(""), pending.id)
            if "echo-message" not in uplink.caps:
                self.await_pong([pending])
            if uplink.unread == UNREAD_WINDOW:
                uplink.send("PING", READ)

    def can_send(self) -> bool:
        """Whether there is a message that may be sent now, as far as the server's pace allows it."""
        rooms, queue = self.rooms, self.queue
        if queue.sent == len(queue) or self.uplink.ours and queue.unanswered() > SEND_WINDOW:
            return False
        return self.uplink.phase == Phase.IN and not (rooms.pending or rooms.syncing())

    def await_pong(self, sent: Sequence[Pending]) -> None:
        """Shows messages of which no echo will come, and asks the server by PING whether they have arrived."""
        if sent and not self.queue.having(SendState.UNCONFIRMED):
            self.uplink.ask_pong(sent[0].id)
        for pending in sent:
            pending.state = SendState.UNCONFIRMED
            self.ui.show(pending.message(self.uplink.nick), True)

    def fold(self, name: str) -> str:
        """A name as the server compares it."""
        return self.uplink.fold(name)


def connect_error(error: Exception, host: str) -> str:
    """Why there is no connection, and what may help."""
    hint = f"is the server running, and there? ({PYTHON} chat.py server)"
    if isinstance(error, socket.gaierror) and re.fullmatch(r"\w+", host):
        hint = f"to be called {host}, say --name {host}"
    return f"{getattr(error, 'strerror', None) or error}; {hint}"


def check_deadlines(client: Client, now: float) -> None:
    """Gives up what has taken too long; connects again when it is time."""
    uplink = client.uplink
    if uplink.phase == Phase.LEAVING:
        if now > uplink.deadline:
            client.end()
    elif client.ui.ended and now > client.queue.last_progress + GIVE_UP_S:
        lines = plural(len(client.queue), "line")
        raise FatalError(f"not delivered within {GIVE_UP_S:.0f} s: {lines}; {client.where} does not confirm them")
    elif uplink.phase == Phase.OFFLINE:
        if now > client.retry_at:
            client.connect()
    elif len(uplink.sendq) > CLIENT_SENDQ:
        client.lose(f"{client.where} does not read what it is sent")
    elif uplink.phase < Phase.IN:
        check_registration(client, now)
    else:
        check_liveness(client, now)


def check_liveness(client: Client, now: float) -> None:
    """Asks a silent server whether it is there; gives up answers that do not come."""
    uplink, rooms = client.uplink, client.rooms
    if now > max(uplink.heard, uplink.ping_sent) + ASK_S:
        if uplink.ping_sent > uplink.heard:
            client.lose(f"{client.where} does not answer any more")
        else:
            uplink.send("PING", "alive")
            uplink.ping_sent = now
    if rooms.pending and now > uplink.deadline:
        abort_switch(client)
    for room in rooms.syncing():
        if room.sync and now > room.sync.asked + HISTORY_S:
            client.ui.show_status(f"the server does not tell what was said in {room.name} before")
            end_page(client, room)


def check_registration(client: Client, now: float) -> None:
    """Gives up a server that does not let us in, or the channel in which we want to speak if we are in others."""
    uplink = client.uplink
    if uplink.phase == Phase.JOINING and client.rooms.joined and now > uplink.deadline:
        abort_switch(client)
        return
    if uplink.phase > Phase.DIALING and uplink.heard == uplink.since and now > uplink.since + CONNECT_S:
        client.lose(f"{client.where} does not answer as a chat or IRC server does; is --port right?")
    elif now > uplink.since + ENTER_S or uplink.phase > Phase.DIALING and now > uplink.heard + ASK_S:
        client.lose(f"{client.where} does not let you in")  # it may look for our name and host first


def tell_typing(client: Client, draft: str, now: float) -> None:
    """Tells those where we speak that something is being typed, but a command, where that is wanted and possible."""
    uplink, rooms = client.uplink, client.rooms
    denied = uplink.isupport.get("CLIENTTAGDENY", "").split(",")
    room = rooms.get(rooms.active) if uplink.phase == Phase.IN and not rooms.pending else None
    may = client.typing.wanted and room and not room.quiet and "message-tags" in uplink.caps
    may = may and not ("typing" in denied or "*" in denied and "-typing" not in denied)
    state = client.typing.step(draft if may and not draft.startswith("/") else "", now)
    if may and state:
        uplink.send("TAGMSG", rooms.active, tags={TYPING_TAG: state})


def is_banned(uplink: Uplink) -> bool:
    """Whether the server has said that it does not want us, rather than only gone away."""
    if uplink.ours or not uplink.error_text:
        return False
    if uplink.phase < Phase.IN:
        return not NOT_NOW_RE.search(uplink.error_text)
    return bool(BANNED_RE.search(uplink.error_text))


def queue_message(client: Client, message: Message) -> None:
    """Queues a PRIVMSG, as several if need be; it goes now, or when the connection is back."""
    for target in filter(None, message.params[0].split(",")):
        pieces = split_message(client.uplink, target, message)
        if not pieces and not client.ui.patient:
            raise FatalError("a line cannot be sent: the channel's name is too long")
        if not pieces:
            client.ui.show_status("Error: that name is too long")
        for piece in pieces:
            client.queue.add(target, piece)
    client.flush_queue()


def split_message(uplink: Uplink, target: str, message: Message, keep: bool = False) -> list[str]:
    """The text of a message in pieces that fit in a line with our prefix; none where the target is too long. `keep`:
    with all blanks."""
    nick = uplink.nick.ljust(uplink.limit("NICKLEN", NICK_CHARS, NICK_BYTES))  # it may change on the way
    userhost = uplink.userhost or "~" + "u" * USER_CHARS + "@" + "h" * 64
    size = max(uplink.limit("LINELEN", LINE_BYTES, SERVER_INPUT_BYTES - TAG_BYTES), LINE_BYTES)
    room = size - len(f":{nick}!{userhost} PRIVMSG {target} :\r\n".encode())
    if room < MIN_PIECE:
        return []
    doing = message.action
    if doing is None:
        return split_text(message.text, room, keep)
    return [action(piece) for piece in split_text(doing, room - len(action("")))]


def split_pasted(uplink: Uplink, target: str, texts: Sequence[str]) -> list[Line]:
    """Pasted lines as those of a message of several: in pieces where they are too long."""
    found = []
    for text in (re.sub("[\0\r\n]", " ", text) if text.strip() else "" for text in texts):
        pieces = split_message(uplink, target, Message("PRIVMSG", (target, text)), keep=True)
        found += [Line(piece, at > 0) for at, piece in enumerate(pieces or [text])]
    return found


def line_groups(lines: Sequence[Line], most_bytes: int, most_lines: int) -> list[list[Line]]:
    """Lines in groups that each can be a message, and neither begin nor end with blank ones."""
    groups: list[list[Line]] = [[]]
    room = most_bytes
    for line in lines:
        size = len(line.text.encode(errors="replace")) + 1
        if size > room or len(groups[-1]) >= most_lines:
            groups.append([])
            room = most_bytes
        room -= size
        if line.text or groups[-1]:
            groups[-1].append(line if groups[-1] else Line(line.text))
    for group in groups:
        while group and not group[-1].text:
            group.pop()
    return [group for group in groups if group]


# Rooms.


def can_join(name: str) -> bool:
    """Whether this can be the name of a channel, and a parameter."""
    return name.startswith(tuple(CHANNEL_TYPES)) and not set(name) & set(" ,")


def request_join(client: Client, channel: str) -> None:
    """Sends JOIN, with the key that we know."""
    key = client.keys.get(fold(channel))
    client.uplink.send("JOIN", channel, *([key] if key else []))


def switch_channel(client: Client, channel: str) -> None:
    """Speaks in a channel from now on if we are in it, else once we have been let in."""
    room = client.rooms.get(channel)
    if room:
        client.rooms.switch(room)
        client.ui.on_names()
    else:
        client.rooms.pending, client.uplink.deadline = channel, time.monotonic() + JOIN_S


def abort_switch(client: Client) -> None:
    """Speaks where we have spoken: the channel that we have asked to join does not let us in."""
    refused, client.rooms.pending = client.rooms.pending, ""
    if client.uplink.phase == Phase.JOINING:
        enter_without(client, refused)


def enter_without(client: Client, channel: str) -> None:
    """We are in the chat again, but not in the channel in which we have spoken, or have wanted to."""
    enter_chat(client, f"connected again, not in {channel}; /join {channel} may bring you back")


def enter_chat(client: Client, status: str) -> None:
    """We are in the chat; `status` says so, if we are again."""
    client.uplink.phase, client.uplink.since = Phase.IN, time.monotonic()
    if status:
        client.ui.show_status(status)
        if client.queue.resent and not client.uplink.ours:
            client.ui.show_status("sent again, so perhaps twice: what this server has not confirmed")
    client.queue.resent = False
    if not client.entered:
        client.entered = True
        client.ui.start()


def set_casemapping(client: Client) -> None:
    """Compares names as the server does, from now on. Ours knows more than a CASEMAPPING can say."""
    uplink = client.uplink
    uplink.fold = fold if uplink.ours else folding(uplink.isupport.get("CASEMAPPING", "rfc1459"))
    client.ignored = {uplink.fold(nick): nick for nick in client.ignored.values()}
    client.rooms.refold()


# The past of a room (draft/chathistory).


def has_history(uplink: Uplink) -> bool:
    """Whether the server can be asked for the past."""
    return {"batch", "draft/chathistory"} <= uplink.caps


def request_history(client: Client, room: Room, replay: int = 0) -> None:
    """Asks for the last lines of a room, or with 0 for those that we missed, a page at a time."""
    most = client.uplink.limit("CHATHISTORY", PAGE_LINES, PAGE_LINES)
    room.sync = room.sync or HistorySync(not replay, min(replay or most, most))
    room.sync.asked = time.monotonic()
    since = ("AFTER", room.name, room.last) if room.last and not replay else ("LATEST", room.name, "*")
    client.uplink.send("CHATHISTORY", *since, str(room.sync.most))


def reference(uplink: Uplink, tags: Mapping[str, str]) -> str:
    """How this server is told where in the past a message with these tags is; '' where there is no way."""
    known = (uplink.isupport.get("MSGREFTYPES") or "msgid,timestamp").split(",")
    found = [f"{kind}={tags[tag]}" for kind, tag in REFERENCES.items() if kind in known and tag in tags]
    return found[0] if found and len(found[0]) < NAME_CHARS else ""


def hold_back(client: Client, message: Message) -> bool:
    """Keeps a message that belongs to a page of the past, or that came after it and so is to be shown after it."""
    batch = message.tags.get("batch")
    for room in client.rooms.joined.values():
        sync = room.sync
        if sync and batch and batch == sync.batch:
            if len(sync.page) < sync.most:  # more of them, we have not asked for
                sync.page.append(message)
            return True
    said_in = client.rooms.get(message.param(0)) if not is_system(message) else None
    if not said_in or not said_in.sync:
        return False
    if len(said_in.sync.held) < HELD_MESSAGES:
        said_in.sync.held.append(message)
    else:
        said_in.sync.overflowed = True
    return True


def end_page(client: Client, room: Room) -> None:
    """Shows a page of the past; asks for the next one, as long as they are full and bring something new."""
    sync = room.sync
    if sync is None:
        return
    page, last = sync.page, room.last
    sync.page, sync.batch, sync.pages = [], "", sync.pages + 1
    old = [message for message in page if not sync.missed and is_shown(client, message)]
    if old:
        client.ui.show_status(f"the last {plural(len(old), 'line')}, said before you came:")
    for message in page:
        client.handle(message if sync.missed else message._replace(tags={**message.tags, REPLAYED_TAG: ""}))
    if old:
        client.ui.show_status("end of what was said before you came")
    if room.sync is sync:
        more = sync.missed and len(page) >= sync.most and room.last != last and sync.pages < HISTORY_PAGES
        (request_history if more else end_sync)(client, room)


def is_shown(client: Client, message: Message) -> bool:
    """Whether a message of the past would be shown: not one of somebody ignored, nor one that was."""
    new = message.tags.get("msgid", "") not in client.seen.ids
    return new and client.fold(message.nick) not in client.ignored and text_form(message) != ""


def end_sync(client: Client, room: Room) -> None:
    """Waits no longer for the past: shows what has come of it, and what was said meanwhile."""
    sync, room.sync = room.sync, None
    if sync is None:
        return
    for message in (*sync.page, *sync.held):
        client.handle(message)
    if sync.overflowed and client.rooms.get(room.name) is room:
        request_history(client, room)


# -----------------------------------------------------------------------------
# handlers
# -----------------------------------------------------------------------------
# What a message means to the client, a function by its command; True: there is nothing to show.

MessageHandler = Callable[[Client, Message], bool]
HANDLERS: dict[str, MessageHandler] = {}

WANTED_CAPS = {
    "batch", "chghost", "draft/chathistory", "echo-message", "message-tags", "server-time", "standard-replies",
    MULTILINE_CAP, REDACT_CAP, RESUME_CAP,
}  # fmt: skip
ISUPPORT_KEYS = ("CASEMAPPING", "CHATHISTORY", "CLIENTTAGDENY", "LINELEN", "MSGREFTYPES", "NICKLEN", "PREFIX")
REFERENCES = {"msgid": "msgid", "timestamp": "time"}  # kinds of them in CHATHISTORY, best first, and their tags
NOT_JOIN_ERRORS = ("404", "442", "470", "482")  # about a channel, but not that we cannot join: 470 sends us on
READ = "read"  # a PING with this is answered when the server has read what was sent before
# In the last words of a server that we should not come back to.
BANNED_RE = re.compile(r"\bkilled\b|\b[dgkqz]-?lined?\b|\bbanned\b", re.IGNORECASE)
NOT_NOW_RE = re.compile(r"throttl|too fast|too many|try again|\bfull\b", re.IGNORECASE)  # of one that lets us in later


def handles(*commands: str) -> Callable[[MessageHandler], MessageHandler]:
    """Enters a function in the table."""

    def enter(function: MessageHandler) -> MessageHandler:
        HANDLERS.update(dict.fromkeys(commands, function))
        return function

    return enter


# Registration.


@handles("CAP")
def on_cap(client: Client, message: Message) -> bool:
    """CAP <name> LS [*] :<capabilities> | ACK, NAK, NEW or DEL :<capabilities>"""
    uplink = client.uplink
    verb, names = message.param(1), {item.partition("=")[0] for item in message.text.split()}
    for value in re.findall(f"(?<!\\S){MULTILINE_CAP}=(\\S+)", message.text):
        found = dict(re.findall("(max-bytes|max-lines)=([1-9][0-9]{0,5})(?![^,])", value))
        client.multiline = int(found.get("max-bytes", 0)), int(found.get("max-lines", MULTILINE_LINES))
    if uplink.negotiated:
        on_cap_change(client, verb, names)
    elif verb == "LS":
        uplink.caps |= names & client.wanted_caps
        if message.param(2) != "*":  # the last line of the list
            uplink.negotiated = not uplink.caps
            uplink.send("CAP", *(("REQ", " ".join(sorted(uplink.caps))) if uplink.caps else ("END",)))
    elif verb in ("ACK", "NAK"):
        uplink.caps, uplink.negotiated = names & client.wanted_caps if verb == "ACK" else set(), True
        known, client.granted = client.granted, uplink.caps if uplink.ours else set()
        if known and not uplink.ours:
            client.ui.show_status(f"{client.where} has become another server; trying again")
            client.lose("it does not grant what it has granted before")
        elif not known:
            if uplink.ours:
                uplink.send("RESUME", client.token)
            uplink.send("CAP", "END")
    return True


def on_cap_change(client: Client, verb: str, names: set[str]) -> None:
    """CAP NEW, DEL, or the answer to what we asked for then."""
    uplink = client.uplink
    wanted = names & client.wanted_caps - uplink.caps
    if verb == "NEW" and wanted:
        uplink.send("CAP", "REQ", " ".join(sorted(wanted)))
    elif verb == "ACK":
        uplink.caps |= wanted
    elif verb == "DEL":
        uplink.caps -= names
    if "echo-message" not in uplink.caps:  # no echo will come
        client.await_pong(client.queue.having(SendState.SENT))


@handles("001")
def on_welcome(client: Client, message: Message) -> bool:
    """001 <name> :<welcome>"""
    uplink = client.uplink
    if uplink.phase != Phase.REGISTERING:
        return True
    uplink.phase, uplink.deadline = Phase.JOINING, time.monotonic() + JOIN_S
    uplink.nick = message.param(0) or uplink.nick
    if uplink.nick != client.desired_nick:
        why = "taken" if uplink.names_tried else "not possible here"
        client.ui.show_status(f"{client.desired_nick} is {why}; you are {uplink.nick}")
    client.desired_nick = uplink.nick
    set_casemapping(client)
    if SPEAK_CAP in uplink.caps:
        client.rooms.pending = ""
        enter_chat(client, "connected again" if client.entered else "")
        return True
    for room in client.rooms.rejoin.values():
        request_join(client, room.name)
        if uplink.ours and has_history(uplink):  # others have not told yet how they are to be asked
            request_history(client, room)
    if client.rooms.pending and client.fold(client.rooms.pending) not in client.rooms.rejoin:
        request_join(client, client.rooms.pending)
    elif not client.rooms.pending:  # we were put out of our channel
        enter_without(client, client.rooms.active)
    return True


@handles("005")
def on_isupport(client: Client, message: Message) -> bool:
    """005 <name> {<token>[=<value>]} :<text>"""
    for item in message.params[1:]:
        token, _, value = item.partition("=")
        if token in ISUPPORT_KEYS:
            client.uplink.isupport[token] = value
    set_casemapping(client)
    return True


@handles("433", "436", "437")
def on_nick_taken(client: Client, message: Message) -> bool:
    """433 <name> <wanted> :<text>; 437 is about a channel, too"""
    uplink, refused = client.uplink, message.param(1)
    if is_channel(refused):
        return on_join_error(client, message)
    if uplink.phase >= Phase.IN:
        return False
    if fold(refused) != fold(uplink.nick):
        if uplink.ours or len(refused) < OLD_NICK_CHARS or not uplink.nick.startswith(refused):
            return True  # about a name that we have given up meanwhile
        uplink.isupport["NICKLEN"] = str(len(refused))  # it cuts names itself
    uplink.names_tried += 1
    if uplink.names_tried > SAME_NAMES:
        raise FatalError(
            f"the name {client.desired_nick} is taken, and so are others like it; choose another with --name"
        )
    uplink.nick = next_nick(uplink.nick, uplink.limit("NICKLEN", NICK_CHARS, NICK_CHARS))
    uplink.send("NICK", uplink.nick)
    return True


@handles("431", "432")
def on_bad_nick(client: Client, message: Message) -> bool:
    """432 <name> <wanted> :<text>"""
    uplink = client.uplink
    if uplink.phase >= Phase.IN:
        return False
    simpler = simpler_nick(uplink.nick)
    if simpler in ("", uplink.nick):
        raise FatalError(f"the server refuses the name {uplink.nick}: {message.text}; choose another with --name")
    if uplink.nick.isascii():
        uplink.isupport["NICKLEN"] = str(OLD_NICK_CHARS)
    uplink.nick = simpler
    uplink.send("NICK", uplink.nick)
    return True


@handles("421", "451")
def on_unknown_command(client: Client, message: Message) -> bool:
    """421 <name> <command> :<text>"""
    return message.param(1) == "CAP"  # an old server, where nothing is lacking


HANDLERS["422"] = lambda client, message: True  # no message of the day


@handles("PING")
def on_ping(client: Client, message: Message) -> bool:
    """PING <token>"""
    client.uplink.send("PONG", *message.params)
    return True


@handles("PONG")
def on_pong(client: Client, message: Message) -> bool:
    """PONG <server> <token>: what was sent before the PING has arrived"""
    if message.text == READ:
        client.uplink.unread = 0
    elif message.text == client.uplink.asked_id:
        client.queue.acknowledge_until(message.text)
        for pending in client.queue.having(SendState.UNCONFIRMED)[-1:]:
            client.uplink.ask_pong(pending.id)
    return True


@handles("KILL")
def on_kill(client: Client, message: Message) -> bool:
    """KILL <name> :<reason>: an operator does not want us here"""
    if client.uplink.is_me(message.param(0)):
        raise FatalError(f"{client.where} has ended the connection: {message.text}")
    return False


@handles("ERROR")
def on_error(client: Client, message: Message) -> bool:
    """ERROR :<text>: the server's last words"""
    client.uplink.error_text = message.text
    first = not client.entered and not client.password
    if first and re.search("password|denied by config", message.text, re.IGNORECASE):  # ngircd, InspIRCd
        how = "if it wants a password, give it in CHAT_PASSWORD or with --password-file"
        raise PasswordRequired(f"{client.where} does not let you in: {message.text}; {how}")
    return True


@handles("396", "CHGHOST")
def on_host(client: Client, message: Message) -> bool:
    """396 <name> [<user>@]<host> :<text> | CHGHOST <user> <host>: somebody is seen by another host, perhaps we"""
    client.uplink.userhost = ""  # until something of ours comes back
    return True


# Rooms.


@handles("JOIN")
def on_join(client: Client, message: Message) -> bool:
    """JOIN <channel>; ours may be one that we have not asked for: a server or a bouncer puts us there"""
    name, key = message.param(0), client.fold(message.param(0))
    room = client.rooms.joined.get(key)
    if client.uplink.phase < Phase.JOINING or not can_join(name):
        return False
    if not client.uplink.is_me(message.nick):
        if room:
            client.rooms.meet(room, message.nick)
        return False
    rejoined, pending = key in client.rooms.rejoin, key == client.fold(client.rooms.pending)
    if not pending and (len(client.rooms.joined) >= MAX_ROOMS or len(name) >= NAME_CHARS):
        return False
    room = client.rooms.rejoin.pop(key, room) or Room(name)
    client.rooms.joined[key], room.name, room.members = room, name, {}
    client.uplink.learn_userhost(message.source)
    if not rejoined:
        # Elsewhere the past has no JOIN, and does not know its msgid.
        tags = message.tags if client.uplink.ours else {tag: message.tags[tag] for tag in message.tags if tag == "time"}
        room.last = reference(client.uplink, tags)
        if pending and client.replay and has_history(client.uplink):
            request_history(client, room, client.replay)
    elif has_history(client.uplink) and not client.uplink.ours:
        request_history(client, room)
    if pending:
        enter_room(client, room)
    return rejoined


def enter_room(client: Client, room: Room) -> None:
    """We are in the channel that we have asked to join."""
    uplink = client.uplink
    client.rooms.switch(room)
    if uplink.phase < Phase.IN:
        gap = "" if has_history(uplink) else "; what was said meanwhile is not known here"
        enter_chat(client, f"connected again{gap}" if client.entered else "")


def is_join_error(client: Client, message: Message) -> bool:
    """Whether an error can only be about a JOIN of ours: there are more of them than anybody has listed."""
    if not (client.rooms.pending or client.rooms.rejoin) or message.command in NOT_JOIN_ERRORS:
        return False
    key = client.fold(message.param(1))
    return (
        key != ""
        and key in (client.fold(client.rooms.pending), *client.rooms.rejoin)
        and bool(re.fullmatch("[45][0-9][0-9]", message.command))
    )


@handles("464", "465", "403", "405", "471", "473", "474", "475", "476", "477")
def on_join_error(client: Client, message: Message) -> bool:
    """<numeric> <name> ... :<text>, which ends all hope as long as we are nowhere"""
    uplink, text, code = client.uplink, message.text, message.command
    if is_join_error(client, message):
        key = client.fold(message.param(1))
        client.rooms.rejoin.pop(key, None)
        elsewhere = key != client.fold(client.rooms.pending)
        if elsewhere or uplink.phase >= Phase.IN or client.rooms.joined or client.rooms.rejoin:
            if not elsewhere:
                abort_switch(client)
            return on_message_error(client, message)
    if uplink.phase >= Phase.IN:
        return on_message_error(client, message)
    if code == "464" and client.password:
        raise PasswordRequired(f"{client.where} does not accept this password")
    if code == "464":
        raise PasswordRequired(f"{client.where} wants a password: give it in CHAT_PASSWORD or with --password-file")
    if code == "465":
        raise FatalError(f"{client.where} does not let you in: {text}")
    key_hint = f"its key goes behind it: --channel '{client.rooms.pending} KEY'"
    hint = key_hint if code == "475" else "choose another with --channel"
    raise FatalError(f"cannot join {client.rooms.pending}: {text}; {hint}")


@handles("470")
def on_forwarded(client: Client, message: Message) -> bool:
    """470 <name> <channel> <other channel> :<text>: we are sent on to that one"""
    asked, other = client.rooms.pending, message.param(2)
    if asked and client.fold(message.param(1)) == client.fold(asked) and can_join(other):
        client.queue.redirect(asked, other)
        room = client.rooms.get(other)
        if room:
            enter_room(client, room)
        else:
            switch_channel(client, other)
    return False


@handles("PART", "KICK")
def on_part(client: Client, message: Message) -> bool:
    """PART <channel> [:<reason>] | KICK <channel> <name> [:<reason>]"""
    room = client.rooms.get(message.param(0))
    nick = message.param(1) if message.command == "KICK" else message.nick
    if room:
        room.members.pop(client.fold(nick), None)
    if not room or not client.uplink.is_me(nick):
        return False
    end_sync(client, room)
    client.rooms.joined.pop(client.fold(room.name), None)
    client.ui.show(message, False)
    if not client.rooms.is_elsewhere(message):
        client.ui.show_status(f"you are no longer in {room.name}; /join {room.name} may bring you back")
    return True


@handles("QUIT")
def on_quit(client: Client, message: Message) -> bool:
    """QUIT [:<reason>]"""
    for room in client.rooms.joined.values():
        room.members.pop(client.fold(message.nick), None)
    return False


@handles("NICK")
def on_nick(client: Client, message: Message) -> bool:
    """NICK <new name>"""
    uplink, old, new = client.uplink, client.fold(message.nick), message.param(0)
    for names in (client.ignored, *(room.members for room in client.rooms.joined.values())):
        if names.pop(old, None) and len(new) < NAME_CHARS:
            names[client.fold(new)] = new
    if client.uplink.is_me(message.nick):
        uplink.nick = client.desired_nick = new
    return False


@handles("MODE")
def on_mode(client: Client, message: Message) -> bool:
    """MODE <channel> <modes>{ <parameter>} | <name> <modes>"""
    return client.rooms.get(message.param(0)) is None


@handles("353")
def on_names(client: Client, message: Message) -> bool:
    """353 <name> = <channel> :[@+]<name>{ [@+]<name>}"""
    room = client.rooms.get(message.param(2))
    ranks = client.uplink.isupport.get("PREFIX", "(qaohv)~&@%+").partition(")")[2]
    if room:
        for name in message.text.split():
            client.rooms.meet(room, name.lstrip(ranks).partition("!")[0])
    return True


@handles("366")
def on_names_end(client: Client, message: Message) -> bool:
    """366 <name> <channel> :<text>"""
    room = client.rooms.get(message.param(1))
    if room and client.fold(client.rooms.active) == client.fold(room.name):
        client.ui.on_names()
    return True


@handles("352")
def on_who(client: Client, message: Message) -> bool:
    """352 <name> <channel> <user> <host> <server> <nick> <H|G>[*][@+] :<hops> <real name>; G: is away"""
    flags = message.param(6)
    if client.who is not None and len(client.who) < MAX_MEMBERS:
        away = " (away)" if flags.startswith("G") else ""
        client.who.append(f"{flags.lstrip('HG*')[:1]}{message.param(5)}{away}")
    return True


@handles("315")
def on_who_end(client: Client, message: Message) -> bool:
    """315 <name> <mask> :<text>"""
    if client.who is not None:
        client.ui.show_status(f"In {message.param(1)}: {' '.join(client.who) or 'nobody whom you may see'}")
    client.who = None
    return True


# Messages.


@handles("PRIVMSG", "NOTICE")
def on_message(client: Client, message: Message) -> bool:
    """PRIVMSG <target> :<text>; our own is an acknowledgement"""
    if is_system(message):
        return False
    mine = client.uplink.is_me(message.nick)
    if mine:
        on_echo(client, message)
    if not client.seen.add(message.tags.get("msgid", "")):
        return True
    room = client.rooms.get(message.param(0))
    if room:
        room.last = reference(client.uplink, message.tags) or room.last
        room.own, room.quiet = (message.tags.get("msgid", ""), False) if mine else (room.own, room.quiet)
    if mine:
        client.ui.show(message, True)
        return True
    key, ctcp = client.fold(message.nick), message.text.startswith("\x01") and message.action is None
    if key in client.ignored or ctcp:
        return True  # a CTCP request, or an answer to one that we have not made
    if room:
        room.unread += client.rooms.is_elsewhere(message)
        if key in room.members:
            room.members[key] = room.members.pop(key)
    elif client.uplink.is_me(message.param(0)):
        client.last_private_sender = message.nick
    return False


@handles("TAGMSG")
def on_tagmsg(client: Client, message: Message) -> bool:
    """TAGMSG <target>, whose tags may say that somebody is typing"""
    key = client.fold(message.nick)
    if TYPING_TAG in message.tags and key not in client.ignored and not client.uplink.is_me(message.nick):
        client.typing.hear(message.nick, key, message.param(0), message.tags[TYPING_TAG])
    return True


@handles("REDACT")
def on_redact(client: Client, message: Message) -> bool:
    """REDACT <target> <msgid> [:<reason>]: what waits to be shown is not, then"""
    client.seen.add(message.param(1))
    return False


def on_echo(client: Client, message: Message) -> None:
    """A message of ours has come back. In the past there are many of them, perhaps of another host."""
    if ID_TAG in message.tags:
        client.queue.acknowledge(message.tags[ID_TAG])
    elif "batch" not in message.tags:
        client.queue.acknowledge_first(message.param(0), client.fold)
    if "batch" not in message.tags:
        client.uplink.learn_userhost(message.source)


@handles("401", "402", "404", "407", "411", "412", "417", "FAIL")
def on_message_error(client: Client, message: Message) -> bool:
    """<numeric> <name> [<target>] :<text>, or FAIL <command> <code> :<text>: about a message of ours, perhaps"""
    if message.command == "FAIL" and message.param(0) not in ("*", "PRIVMSG", "BATCH"):
        if message.param(0) == "TAGMSG":
            return hush(client, message)
        if message.param(0) == "CHATHISTORY":
            named = [client.fold(param) for param in message.params if is_channel(param)]
            for room in client.rooms.syncing():
                if not named or client.fold(room.name) in named:
                    end_page(client, room)
        return False
    nobodys = message.command in ("411", "412", "417", "FAIL")  # does not tell whom the message was for
    target = "" if nobodys else message.param(1) or "?"
    if client.queue.acknowledge_first(target, client.fold):
        if not client.ui.patient:
            raise FatalError(f"a line was not delivered: {message.text}")
        return False
    return message.command == "404" and hush(client, message)


def hush(client: Client, message: Message) -> bool:
    """That we type may not be told where we speak: then it is not; True if a refusal can be about that."""
    room = client.rooms.get(client.rooms.active)
    told = room and client.typing.draft and client.fold(room.name) in map(client.fold, message.params)
    if room and told:
        room.quiet = True
    return bool(told)


@handles("BATCH")
def on_batch(client: Client, message: Message) -> bool:
    """BATCH +<reference> chathistory <channel> | BATCH -<reference>"""
    mark, reference = message.param(0)[:1], message.param(0)[1:]
    if mark == "+" and message.param(1) == "chathistory":
        room = client.rooms.get(message.param(2))
        if room and room.sync:
            room.sync.batch = reference
    elif mark == "-" and reference:
        for room in client.rooms.syncing():
            if room.sync and room.sync.batch == reference:
                end_page(client, room)
    return True


# What a line that was typed does, by the command that it stands for.


def send_command(client: Client, message: Message) -> None:
    """A command for the server."""
    if client.uplink.phase != Phase.IN:
        client.ui.show_status("Error: not connected; only messages wait until we are")
        return
    client.uplink.send(message.command, *message.params)


def enter_pasted(client: Client, texts: Sequence[str]) -> None:
    """Pasted lines: as few messages as the server allows, or one each."""
    here = client.rooms.pending or client.rooms.active
    for group in line_groups(split_pasted(client.uplink, here, texts), *client.multiline):
        message = join_lines(Message("PRIVMSG", (here,)), group)
        if len(group) > 1:
            client.queue.add(here, message.text, message.tags[LINES_TAG])
        else:
            queue_message(client, message)
    client.flush_queue()


def enter_who(client: Client, message: Message) -> None:
    """/who [#NAME]: WHO tells who is away, too"""
    client.who = []
    send_command(client, Message("WHO", message.params))


def enter_join(client: Client, message: Message) -> None:
    """/join #NAME [KEY]: speaks there from now on"""
    channel = with_channel_type(message.param(0))
    if client.uplink.phase != Phase.IN:
        send_command(client, message)
    elif client.rooms.pending or not can_join(channel):
        client.ui.show_status("Error: one channel at a time")
    else:
        if message.param(1):
            client.keys[fold(channel)] = message.param(1)
        if not client.rooms.get(channel):
            request_join(client, channel)
        switch_channel(client, channel)


def enter_part(client: Client, message: Message) -> None:
    """/part [#NAME]: speaks in another room, if there is one"""
    send_command(client, message)
    others = client.rooms.others()
    if client.uplink.phase == Phase.IN and others and not client.rooms.is_elsewhere(message):
        switch_channel(client, others[-1].name)


def enter_reply(client: Client, message: Message) -> None:
    """/reply TEXT"""
    if client.last_private_sender:
        queue_message(client, Message("PRIVMSG", (client.last_private_sender, message.text)))
    else:
        client.ui.show_status("Error: nobody has spoken to you alone yet; it is /msg NAME TEXT")


def enter_redact(client: Client, message: Message) -> None:
    """/redact [ID [TEXT]]: our last line, if it is none other"""
    target, msgid, *reason = message.params
    room = client.rooms.get(target)
    msgid = msgid if msgid != "*" else room.own if room else ""
    if client.uplink.phase == Phase.IN and REDACT_CAP not in client.uplink.caps:
        client.ui.show_status("Error: this server does not let lines be removed")
    elif not msgid:
        client.ui.show_status("Error: you have said nothing here that could be removed")
    else:
        send_command(client, Message("REDACT", (target, msgid, *reason)))


def enter_ignore(client: Client, message: Message) -> None:
    """/ignore [NAME]"""
    name, key = message.text, client.fold(message.text)
    if not name:
        client.ui.show_status(f"ignored: {', '.join(client.ignored.values()) or 'nobody'}")
    elif client.ignored.pop(key, None):
        client.ui.show_status(f"{name} is shown again")
    else:
        client.ignored[key] = next(
            (room.members[key] for room in client.rooms.joined.values() if key in room.members), name
        )
        client.ui.show_status(f"{name} is ignored; the same again shows their messages")


def enter_help(client: Client, message: Message) -> None:
    """/help [COMMAND or keys]"""
    asked = message.param(0)
    lines = KEY_HELP.splitlines() if asked == "keys" else help_lines(asked, local=True)
    for line in lines if asked else [*lines, f"{'/help keys':18}shows what the keys do"]:
        client.ui.show_status(line)


LOCAL_COMMANDS: dict[str, Callable[[Client, Message], None]] = {
    "PRIVMSG": queue_message,
    "QUIT": lambda client, message: client.leave(message.text),
    "JOIN": enter_join,
    "PART": enter_part,
    "NAMES": enter_who,
    "REPLY": enter_reply,
    "IGNORE": enter_ignore,
    "REDACT": enter_redact,
    "HELP": enter_help,
    "CLEAR": lambda client, message: client.ui.clear(),
}


# -----------------------------------------------------------------------------
# user interfaces
# -----------------------------------------------------------------------------


class PipeUI(UserInterface):
    """Lines in from `source`; lines, or JSON objects, on standard output. What the client says goes to standard error.

    Leaves when all lines are delivered. Where `commands` are looked for, there is a person, at a simple terminal.
    """

    def __init__(
        self, client: Client, source: Any, commands: bool = False, as_json: bool = False, quiet: bool = False
    ) -> None:
        self.patient = self._commands = commands
        self._client = client
        self._source = source
        self._json = as_json
        self._quiet = quiet
        self._timed = commands or is_regular_file(sys.stdout)  # a pipe's reader wants the lines alone
        self._lines: queue.Queue[bytes | FatalError | None] = queue.Queue(PIPE_WINDOW)  # None: no more

    def start(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """A thread: queues each line of the input, without the byte-order mark of a file.

        Reads below the buffer, whose lock a thread that is still there when the program ends must not hold.
        """
        lines, data, mark = LineBuffer(SERVER_INPUT_BYTES), b"\n", codecs.BOM_UTF8
        while data and self._source:
            try:
                data = self._source.read(RECV_BYTES)
                if data is None:  # not yet: somebody has made it non-blocking
                    wait_for([self._source], [])
                    data = b"\n"
                    continue
            except OSError as error:
                self._put(FatalError(f"cannot read the input: {error.strerror}"))
                return
            for line in lines.feed(data or b"\n"):
                if line is None:
                    self._put(FatalError("a line of the input is too long"))
                    return
                self._put(line[len(mark) :] if line.startswith(mark) else line)
                mark = b""
        self._put(None)

    def _put(self, item: bytes | FatalError | None) -> None:
        self._lines.put(item)  # waits while there is no room
        self._client.wakeup.wake()

    def update(self) -> None:
        """Takes lines as long as not too many wait for their acknowledgement; leaves after the last."""
        client = self._client
        while not self.ended and client.entered and len(client.queue) < PIPE_WINDOW:
            try:
                item = self._lines.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, FatalError):
                raise item
            self.ended = item is None
            if item:
                client.enter(decode_input(item), self._commands)
        if self.ended and (self.patient or not client.queue) and client.uplink.phase != Phase.LEAVING:
            client.leave()

    def show(self, message: Message, mine: bool) -> None:
        if self._json:
            write_json(message._replace(command="ACK") if mine else message)
            return
        hidden = self._quiet or (mine and fold(message.param(0)) != fold(message.nick))
        for line in () if hidden else each_line(message):
            shown = text_form(line, elsewhere=self._client.rooms.is_elsewhere(message))
            if shown:
                print(f"{timestamp(message)} {shown}" if self._timed else shown, flush=True)

    def show_status(self, text: str) -> None:
        if sys.stderr:
            print(f"*** {escape_controls(text)}", file=sys.stderr, flush=True)


def decode_input(line: bytes) -> str:
    """The text of a line of standard input, in UTF-8; on Windows perhaps in the code page of older programs."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("oem" if sys.platform == "win32" else "utf-8", "replace")


class TerminalUI(UserInterface):
    """Somebody at a terminal."""

    def __init__(self, client: Client, terminal: Terminal) -> None:
        self._client = client
        self._terminal = terminal
        self._greeted = ""  # the channel of which we last told who is there
        self._day = time.localtime()[:3]  # of what was shown last
        self._drawn = 0.0  # monotonic

    def start(self) -> None:
        self._terminal.start()

    def update(self) -> None:
        """Takes what was typed, and draws what changes, at most every FRAME_S while much is happening."""
        client, terminal = self._client, self._terminal
        for submission in terminal.submissions():
            client.typing.reset()
            if submission.pasted:
                enter_pasted(client, submission.lines)
            for line in () if submission.pasted else submission.lines:
                client.enter(line, True)
        if terminal.hung_up and client.uplink.phase != Phase.LEAVING:
            client.leave()
        now = time.monotonic()
        tell_typing(client, terminal.draft(), now)
        if client.uplink.drained or now > self._drawn + FRAME_S:
            self._drawn = now
            self._draw(now)

    def _draw(self, now: float) -> None:
        client = self._client
        self._print("", time.localtime())
        waiting = []
        for pending in client.queue.messages[-WAITING_ROWS:]:
            if pending.state != SendState.UNCONFIRMED:  # those are shown as sent
                waiting.append(f"  ... {self._own_form(pending.message(client.uplink.nick))}")
        waiting += self._typing()
        nick, state = escape_controls(client.uplink.nick), self._state(now)
        prompts = [f"[{state}] {nick}> ", f"[{state.partition(' | ')[0]}] ", "> "]
        self._terminal.draw(waiting, prompts)

    def _state(self, now: float) -> str:
        """What the prompt says: where we are and how many, and what is unread elsewhere."""
        client, phase = self._client, self._client.uplink.phase
        if phase == Phase.OFFLINE:
            return f"offline, next try in {max(math.ceil(client.retry_at - now), 0)} s"
        if phase < Phase.IN:
            return "connecting"
        room = client.rooms.get(client.rooms.active)
        here = f"{escape_controls(client.rooms.active)} {len(room.members) if room else 0}"
        unread = [f"{escape_controls(other.name)} +{other.unread}" for other in client.rooms.others() if other.unread]
        return " | ".join([here, *unread])

    def _typing(self) -> list[str]:
        """A row that says who is typing, if somebody does so here or to us alone."""
        fold, here, nick = self._client.fold, self._client.rooms.active, self._client.uplink.nick
        about = {fold(here): "", fold(nick): " (private)"}
        others = self._client.typing.others.values()
        names = [name + about[fold(target)] for name, target, _ in others if fold(target) in about]
        are = "is" if len(names) == 1 else "are"
        return [f"  ... {escape_controls(', '.join(names))} {are} typing"] if names else []

    def show(self, message: Message, mine: bool) -> None:
        system, paint = is_system(message), self._terminal.paint
        private = not system and not is_channel(message.param(0))
        mentioned = not (system or mine) and mentions(message.text, self._client.uplink.nick)
        name = escape_controls if system else functools.partial(self._name, mentioned)
        first, *more = whole_text(message).split("\n")
        if more:
            message = message._replace(params=(message.param(0), first))
        text = text_form(message, name, self._client.rooms.is_elsewhere(message))
        if not text:
            return
        if system:
            text = paint(text, RED if text.startswith("*** Error: ") else DIM)
        elif private:
            start = self._own_form(message).partition("]")[0] if mine else "[private"
            text = paint(f"{start}]", MAGENTA) + text[len("[private]") :]
        past = REPLAYED_TAG in message.tags
        if (mentioned or (private and not mine)) and not past:
            self._terminal.bell()
        self._print(text, local_time(message.tags.get("time", "")), past)
        for line in more:
            self._terminal.print(" " * INDENT + escape_controls(line))

    def _own_form(self, message: Message) -> str:
        """How we read a message of our own, which may be private."""
        text = text_form(message, elsewhere=self._client.rooms.is_elsewhere(message))
        return f"[private to {escape_controls(message.param(0))}]{text[9:]}" if text.startswith("[private] ") else text

    def _name(self, mentioned: bool, nick: str) -> str:
        """A sender's name, in the colour that it always has; our own stands out, and who means us even more."""
        colours = self._terminal.colours
        colour = colours[zlib.crc32(fold(nick).encode()) % len(colours)] if colours else ""
        look = (BOLD, REVERSE) if mentioned else (BOLD,) if self._client.uplink.is_me(nick) else ()
        return self._terminal.paint(escape_controls(nick), *look, colour)

    def _print(self, text: str, moment: time.struct_time, past: bool = False) -> None:
        if moment[:3] > self._day or past and moment[:3] != self._day:
            self._day = moment[:3]
            self._terminal.print(self._terminal.paint(time.strftime("--- %A, %d %B %Y ---", moment), DIM))
        if text:
            self._terminal.print(f"{self._terminal.paint(time.strftime('%H:%M', moment), DIM)} {text}")

    def show_status(self, text: str) -> None:
        look = RED if text.startswith("Error: ") else DIM
        self._print(self._terminal.paint(f"*** {escape_controls(text)}", look), time.localtime())

    def on_names(self) -> None:
        client = self._client
        room = client.rooms.get(client.rooms.active)
        others = [nick for nick in room.members.values() if not client.uplink.is_me(nick)] if room else []
        who = f"{len(others)} others" if len(others) > NAMES_SHOWN else ", ".join(others) or "nobody else yet"
        hint = "" if self._greeted else "; /help tells what you can do, /quit leaves"
        if self._greeted != client.rooms.active:
            self.show_status(f"here: {who}{hint}")
        self._greeted = client.rooms.active

    def clear(self) -> None:
        self._terminal.clear()


def mentions(text: str, nick: str) -> bool:
    """Whether a text contains a name as a word."""
    words = " ".join(map(fold, text.split()))  # not as one: a long text is not folded
    return bool(re.search(rf"(?<!\w){re.escape(fold(nick))}(?!\w)", words))


def local_time(stamp: str) -> time.struct_time:
    """The local time of an IRCv3 server-time; now, where that is none."""
    try:
        return time.localtime(calendar.timegm(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S")))
    except (ValueError, OverflowError, OSError):
        return time.localtime()


def completions(client: Client, head: str) -> tuple[int, list[str]]:
    """Where the word at the end of `head` begins, and what it may become: a slash command, a room, or whom we heard
    last."""
    start = head.rfind(" ") + 1
    word, room = client.fold(head[start:]), client.rooms.get(client.rooms.active)
    if start == 0 and word.startswith("/"):
        return 0, [f"/{name} " for name in SLASH_COMMANDS if name.startswith(word[1:].lower())]
    if start and is_channel(word):
        return start, [f"{other.name} " for key, other in client.rooms.joined.items() if key.startswith(word)]
    names = [nick for key, nick in reversed(list(room.members.items())) if key.startswith(word)] if room else []
    return start, [nick + (" " if start else ": ") for nick in names if not client.uplink.is_me(nick)]


# -----------------------------------------------------------------------------
# operator
# -----------------------------------------------------------------------------


class OperatorCommands(cmd.Cmd):
    """Commands of the operator, with or without a slash: /help and help. The docstring of a command is its grammar and
    what it does; a word in brackets may be left out."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.answers: list[str] = []  # to one line; only collected, because commands hold the hub's lock
        docs = {name: getattr(self, f"do_{name}").__doc__ or "" for name in self.completenames("")}
        self.help = {name: doc.partition(": ") for name, doc in docs.items()}  # grammar, colon, text

    def run(self, line: str) -> list[str]:
        """Runs a line, if it follows its command's grammar; returns the answer, a line each."""
        name, arg, line = self.parseline(line)
        grammar = self.help.get(name, ("",))[0]
        params = grammar.partition(" ")[2]
        self.answers = []
        if grammar and (arg and not params or not arg and params[:1].isalpha()):
            self.answers.append(f"Error: it is {grammar}")
        elif line:  # for an empty one, cmd repeats the last command
            self.onecmd(line)
        return self.answers

    def parseline(self, line: str) -> tuple[str, str, str]:
        """The command, its argument, and both; cmd's own makes commands of ?, ! and EOF."""
        name, _, arg = line.strip().partition(" ")
        return name[name.startswith("/") :].lower(), arg.strip(), line.strip()

    def default(self, line: str) -> None:
        """Answers to what is not a command."""
        self.answers.append("Error: these are commands of the server: /help lists them; to talk, join with a client")

    def do_help(self, arg: str) -> None:
        """/help [COMMAND]: shows this, or one"""
        asked = arg.lstrip("/").lower()
        if asked and asked not in self.help:
            self.default(arg)
        for name, (grammar, _, text) in self.help.items():
            if asked in ("", name):
                self.answers.append(f"{grammar:24}{text}")

    def do_who(self, arg: str) -> None:
        """/who: shows who is here, and from where"""
        now = time.time()
        with self.server.hub as hub:
            for session in [session for session in hub.sessions if session.registered]:
                where = " ".join(channel.name for channel in session.channels) or "in no channel"
                lost = session.stage == Stage.DISCONNECTED
                kind = "lost its connection" if lost else type(session.dialect).__name__
                silent = format_duration(now - session.last_spoke)
                self.answers.append(f"{session.description()}, {kind}, silent for {silent}: {where}")
        self.answers = self.answers or ["nobody is here"]

    def do_kick(self, arg: str) -> None:
        """/kick NAME [REASON]: throws somebody out"""
        nick, _, reason = arg.partition(" ")
        with self.server.hub as hub:
            session = hub.nicks.get(fold(nick))
            if session:
                kill_session(hub, session, reason.strip() or "by the operator")
            else:
                self.answers.append(f"Error: nobody here is called {nick}")

    def do_op(self, arg: str) -> None:
        """/op NAME: lets somebody moderate the channels that they are in"""
        with self.server.hub as hub:
            session = hub.nicks.get(fold(arg))
            channels = session.channels if session else ()
            for channel in channels:
                assert session
                call = Call(hub, session)
                change_modes(call, channel, [ModeChange(True, "o", session.nick)], hub.name)
                hub.append(call)
            names = " ".join(channel.name for channel in channels)
            problem = "is in no channel" if session else "is not here"
            self.answers.append(f"{arg} may moderate {names}" if names else f"Error: {arg} {problem}")

    def do_ban(self, arg: str) -> None:
        """/ban [NAME or ADDRESS]: shuts an address out, or no more; alone: shows which"""
        with self.server.hub as hub:
            shown = f"banned: {', '.join(hub.access.banned.values()) or 'nobody'}"
            self.answers.append(toggle_ban(hub, arg.partition(" ")[0]) if arg else shown)

    def do_say(self, arg: str) -> None:
        """/say TEXT: tells everybody"""
        with self.server.hub as hub:
            sessions = [session for session in hub.sessions if session.registered]
            pieces = split_text(escape_controls(arg), TOPIC_BYTES)
            for session in sessions:
                call = Call(hub, session)
                call.replies += [Message("NOTICE", ("*", f"From the operator: {piece}"), hub.name) for piece in pieces]
                hub.append(call)
        self.answers.append(f"told {plural(len(sessions), 'person', 'people')}")

    def do_stats(self, arg: str) -> None:
        """/stats: shows what the server has done"""
        people, channels, connections, messages, deliveries, memory, started = self.server.figures().values()
        self.answers += [
            f"{plural(int(people), 'person', 'people')} in {plural(int(channels), 'channel')},"
            f" {plural(int(connections), 'connection')}",
            f"{plural(int(messages), 'message')}, {plural(int(deliveries), 'delivery', 'deliveries')}",
            f"{'?' if math.isnan(memory) else round(memory / 1e6)} MB, up for {format_duration(time.time() - started)}",
        ]

    def do_stop(self, arg: str) -> None:
        """/stop: ends the chat"""
        stop_server(self.server, "/stop")


def stop_server(server: Server, reason: str) -> None:
    """Ends a server, with the reason in the log."""
    log_later(logging.INFO, "stopped by %s", reason)
    server.stop()


def toggle_ban(hub: Hub, who: str) -> str:
    """Bans everybody from the address of a name or the address given, or no longer; returns the answer. Where addresses
    tell nothing, on loopback, the name is banned. With the lock held."""
    banned = hub.access.banned
    session = hub.nicks.get(fold(who))
    try:
        address = session.address if session and session.host != "localhost" else hub.access.address(who)
        key = address.key
    except ValueError:
        key = fold(who)
        if not session and key not in banned:
            return f"Error: {who} is neither the name of somebody here nor an address"
    if banned.pop(key, None):
        return f"{who} may come back"
    banned[key] = f"{who} ({key})" if session and key == session.address.key else who
    for other in [other for other in hub.sessions if key in (other.address.key, fold(other.nick))]:
        kill_session(hub, other, "banned")
    return f"{banned[key]} is banned, until the server ends; the same again lets them back"


def kill_session(hub: Hub, session: Session, why: str) -> None:
    """Ends a session, whose client is told not to come back at once. With the lock held."""
    reason = f"Thrown out: {cut(why, REASON_BYTES)}"
    call = Call(hub, session)
    call.send_to(session, Message("KILL", (session.nick, reason), hub.name))
    call.quit(session, reason, reason)
    hub.append(call)


def format_duration(seconds: float) -> str:
    """A length of time: 5 s, 3 min, 2 h 5 min, 3 d 4 h."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if minutes < 1:
        return f"{max(seconds, 0):.0f} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


class OperatorConsole:
    """The operator's terminal: the log and the answers scroll above the line that is typed. Of the main thread."""

    def __init__(self, server: Server) -> None:
        self.wakeup = Wakeup()
        self.terminal = Terminal(self.wakeup, self._complete)
        self.in_front = in_foreground()  # or started with & and waiting for the shell's fg
        self._server, self._commands = server, OperatorCommands(server)
        self._lines: queue.Queue[str] = queue.Queue(LOG_QUEUE)  # of the log

    def show(self, line: str) -> None:
        """Shows a line; waits while too many have not been shown. Any thread but the main one."""
        if not self.in_front:
            print(line, file=sys.stderr, flush=True)
            return
        self._lines.put(line)
        self.wakeup.wake()

    def run(self, serving: threading.Thread) -> None:
        """Until the server ends, or the terminal is gone: then it may raise one of TERMINAL_ERRORS."""
        while serving.is_alive() and not self.in_front:
            if wait_for([self.wakeup], [], FOREGROUND_S):
                self.wakeup.clear()
            self.in_front = in_foreground()
        if not self.in_front:
            return
        with self.terminal as terminal:
            terminal.start()
            while serving.is_alive() and not terminal.hung_up:
                terminal.draw([], ["server> "])
                wait_for([self.wakeup], [])
                self.wakeup.clear()
                for line in self.lines():
                    terminal.print(line)
                self._obey()

    def lines(self) -> Iterator[str]:
        """The lines that have not been shown yet."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._lines.get_nowait()

    def _obey(self) -> None:
        """Runs the commands that have been entered."""
        terminal = self.terminal
        try:
            for submission in terminal.submissions():
                for line in filter(str.strip, submission.lines):
                    terminal.print(terminal.paint(f"server> {escape_controls(line)}", DIM))
                    for answer in self._commands.run(line):
                        terminal.print(escape_controls(answer))
        except KeyboardInterrupt:
            stop_server(self._server, "Ctrl-C")

    def _complete(self, head: str) -> tuple[int, list[str]]:
        start = head.rfind(" ") + 1
        word = head[start:]
        if not start:
            return 0, [f"/{name} " for name in self._commands.completenames(word.lstrip("/"))]
        with self._server.hub as hub:
            return start, [session.nick for key, session in hub.nicks.items() if key.startswith(fold(word))]


# -----------------------------------------------------------------------------
# command line
# -----------------------------------------------------------------------------


def run_server(args: argparse.Namespace) -> int:
    """chat.py server"""
    if not re.fullmatch(r"[A-Za-z0-9.-]{1,63}", args.server_name):
        raise FatalError("a --server-name is up to 63 letters, digits, dots and hyphens")
    raise_descriptor_limit()
    if hasattr(gc, "set_threshold"):  # not PyPy; with the default, a third of the time in which 9,000 join
        gc.set_threshold(50_000, 20, 20)
    password = read_password(args.password_file)
    check_password(password)
    try:
        access = AccessControl(args.exempt, password)
    except ValueError as error:
        raise FatalError(f"--exempt takes networks such as 192.168.0.0/24: {error}") from None
    certificate, context = tls_from_args(args)
    with contextlib.ExitStack() as opened:  # what is closed again where the server cannot start
        with naming("--log", args.log):  # before others can connect
            log_file = logging.handlers.WatchedFileHandler(args.log, encoding="utf-8") if args.log else None
        if log_file:
            opened.callback(log_file.close)
        history = SqliteHistory(args.history, args.fsync, args.keep) if args.history else MemoryHistory()
        opened.callback(history.close)
        hub = Hub(args.server_name, history, args.replay, limits_from_args(args))
        hub.access = access
        server = begin_server(args, hub, context)
        opened.pop_all()
    greeting = join_instructions(server.listener.hosts, server.listener.port, certificate, args.tls_only)
    extras = [f"history in {args.history or 'memory'}", "a password" if password else "no password"]
    extras.append("TLS only" if args.tls_only else "TLS" if context else "no TLS")
    return serve_until_stopped(server, greeting, ", ".join(extras), args.verbose, log_file)


def begin_server(args: argparse.Namespace, hub: Hub, context: ssl.SSLContext | None) -> Server:
    """A server that listens as the arguments say; raises FatalError where that cannot be done."""
    try:
        return Server(args.host, args.port, hub, context, args.tls_only, args.web_origin)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise FatalError(f"port {args.port} is taken; choose another with --port, or any with --port 0") from None
        reason = getattr(error, "strerror", None) or str(error)
        raise FatalError(f"cannot listen on {args.host}:{args.port}: {reason}") from None


def serve_until_stopped(
    server: Server, greeting: str, extras: str, verbose: bool, log_file: logging.Handler | None
) -> int:
    """Lets a server serve, with its log and its terminal; returns the exit code."""
    console = OperatorConsole(server) if has_terminal() else None
    handle_signals(server, console, log_file)
    handler = log_file or logging.StreamHandler()
    if console and not log_file and is_terminal(sys.stderr):
        handler = ConsoleHandler(console)
    end_log = begin_log(handler, verbose)
    host, port = server.address
    print(f"listening on {host}:{port}\n{greeting}", flush=True)
    if not isinstance(handler, ConsoleHandler):
        where = ", ".join(f"{host}:{port}" for host in server.listener.hosts)
        log_later(logging.INFO, "%s, Python %s: listening on %s; %s", VERSION, platform.python_version(), where, extras)
    reachable = [host for host in server.listener.hosts if not plain_address(host).is_loopback]
    if reachable and not server.hub.access.password_required:
        text = "there is no password: whoever reaches %s can join (--password-file sets one)"
        log_later(logging.WARNING, text, reachable[0])
    if console:
        serving = threading.Thread(target=serve_and_end, args=(server, console), daemon=True)
        serving.start()
        with contextlib.suppress(*TERMINAL_ERRORS):
            console.run(serving)
        serving.join()
    else:
        server.serve()
    status, ended = int(server.mailer.failed), end_log()
    try:
        for line in console.lines() if console else ():
            print(line)
        print(end="", flush=True)  # also what a terminal that is gone did not take before
    except OSError:
        abandon_output()
    if not ended:  # its thread holds the stream's lock, without which Python does not end
        os._exit(status)
    return status


def handle_signals(server: Server, console: OperatorConsole | None, log_file: logging.Handler | None) -> None:
    """Lets signals end the server; but SIGHUP only when it tells that the operator's terminal is gone."""

    def on_signal(number: int, _: object) -> None:
        name = signal.Signals(number).name
        if name == "SIGHUP" and not (console and console.in_front and not is_terminal(sys.stdin)):
            if log_file:  # which opens its file anew for a record
                log_later(logging.INFO, "SIGHUP: the log file is opened anew")
        elif name != "SIGINT" or not (console and console.terminal.interrupt()):
            stop_server(server, name)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), on_signal)


def serve_and_end(server: Server, console: OperatorConsole) -> None:
    """Lets a server serve; afterwards the program ends soon, even if its terminal takes nothing."""
    server.serve()
    _thread.start_new_thread(end_soon, (int(server.mailer.failed), console.terminal))
    console.wakeup.wake()


def has_terminal() -> bool:
    """Whether a person could type here, and see what comes of it."""
    return is_terminal(sys.stdin) and is_terminal(sys.stdout)


def tls_from_args(args: argparse.Namespace) -> tuple[str, ssl.SSLContext | None]:
    """The fingerprint of the server's certificate, and what it encrypts with; ('', None) for no TLS."""
    if not (args.tls or args.tls_only or args.tls_cert):
        if args.tls_key:
            raise FatalError("--tls-key needs --tls-cert")
        return "", None
    path = args.tls_cert or self_signed(args.server_name)
    try:
        context = server_context(path, args.tls_key)
        found = re.search("-----BEGIN CERTIFICATE-----.*?-----END", pathlib.Path(path).read_text("latin-1"), re.DOTALL)
    except ImportError as error:
        raise FatalError(f"this Python has no TLS: {error}") from None
    except OSError as error:
        raise FatalError(f"cannot use {path} for TLS: {error}") from None
    if not found:
        raise FatalError(f"cannot use {path} for TLS: there is no BEGIN CERTIFICATE in it")
    body = found[0].partition("\n")[2].rpartition("\n")[0]
    return fingerprint_of(binascii.a2b_base64(body)), context


def self_signed(name: str) -> str:
    """The file of a certificate of our own, with its key, which is made when it is not there yet."""
    folder = pathlib.Path(os.path.expanduser("~"), ".chat.py")
    path, new = folder / "tls.pem", folder / f"new-{os.getpid()}.pem"
    if path.exists():
        return str(path)
    openssl = shutil.which("openssl")
    if not openssl:
        raise FatalError(
            "--tls needs the openssl program to make a certificate; otherwise give --tls-cert and --tls-key"
        )
    try:
        folder.mkdir(0o700, exist_ok=True)
        new.touch(0o600)
    except OSError as error:
        raise FatalError(f"cannot keep a certificate: {error}; otherwise give --tls-cert and --tls-key") from None
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3650"]
    command = [openssl, "req", "-x509", *kind, "-subj", f"/CN={name}", "-keyout", str(new), "-out", str(new)]
    made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if made.returncode:
        new.unlink()
        raise FatalError(f"openssl cannot make a certificate: {made.stderr.strip().rpartition(chr(10))[2]}")
    os.replace(new, path)
    return str(path)


def limits_from_args(args: argparse.Namespace) -> Limits:
    """The limits that the command line tells."""
    names = [field.name for field in dataclasses.fields(Limits)]
    chosen = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    return Limits(**{**dict.fromkeys(names if args.no_limits else (), math.inf), **chosen})


def begin_log(handler: logging.Handler, verbose: bool) -> Callable[[], bool]:
    """Has the log written by a thread, because a terminal or a pipe may take nothing for as long as it likes.

    Returns what ends that; it tells whether all is written.
    """
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(RateLimitFilter())
    logging.raiseExceptions = False  # a log that cannot be written is no reason to write that down each time
    least = logging.DEBUG if verbose else logging.INFO

    def write() -> None:
        for when, level, text, values in iter(log_records.get, None):
            fields = {"created": when, "msecs": when % 1 * 1000, "levelname": logging.getLevelName(level)}
            record = logging.makeLogRecord({**fields, "msg": text, "args": values})
            if level >= least:
                with contextlib.suppress(OSError):  # its file cannot be opened anew: perhaps for the next one
                    handler.handle(record)

    def end() -> bool:
        log_records.put(None)
        writer.join(LOG_END_S)
        return not writer.is_alive()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    return end


class ConsoleHandler(logging.Handler):
    """Shows the log at the operator's terminal."""

    def __init__(self, console: OperatorConsole) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self.console.show(line)


class RateLimitFilter(logging.Filter):
    """Lets through so many records of a kind at a time, and tells later how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[str, tuple[TokenBucket, list[int]]] = {}  # text before values are put in -> [left out]

    def filter(self, record: logging.LogRecord) -> bool:
        bucket, left_out = self._kinds.setdefault(record.msg, (TokenBucket(LOG_BURST, LOG_INTERVAL_S), [0]))
        if not bucket.allow(time.monotonic()):
            left_out[0] += 1
            return False
        if left_out[0]:
            record.msg, left_out[0] = f"{record.msg} ({left_out[0]} more like this are not shown)", 0
        return True


def join_instructions(hosts: list[str], port: int, fingerprint: str, tls_only: bool) -> str:
    """How to join, ready to paste."""
    lines = []
    addresses = [host for host in hosts if not plain_address(host).is_unspecified]
    for family in (socket.AF_INET, socket.AF_INET6) if "::" in hosts else (socket.AF_INET,) * ("0.0.0.0" in hosts):
        addresses += own_addresses(family)
    if all(plain_address(host).is_loopback for host in hosts):
        lines.append("only this machine can join; --host 0.0.0.0 opens the chat to the network")
    elif not addresses:
        addresses = ["127.0.0.1"]
        how = "ipconfig" if sys.platform == "win32" else "ifconfig" if sys.platform == "darwin" else "ip address"
        lines.append(f"no address of this machine is known here; for others, look for one with: {how}")
    for address in addresses:
        secured = f" --fingerprint {fingerprint}" if fingerprint else ""
        name = f"[{address}]" if ":" in address else address
        lines.append(f"  a browser: http{'s' if fingerprint else ''}://{name}:{port}/")
        lines.append(f"  {PYTHON} chat.py client --host {address} --port {port}{secured}")
        if not tls_only:
            lines.append(f"  nc {address} {port}")
    how = f"TLS, fingerprint (SHA-256) {fingerprint}" if fingerprint else "no TLS"
    lines.append(f"  any IRC client: server {addresses[0]}, port {port}, {how}, then /join {DEFAULT_CHANNEL}")
    return "\n".join(lines)


def own_addresses(family: int) -> list[str]:
    """The addresses under which others may reach this machine, the one that leads furthest first.

    Sends nothing: a datagram socket only chooses the address from which it would send, to somewhere else (RFC 5737,
    3849) where there is a route, then to a group of neighbours at each interface, for which none is needed.
    """
    elsewhere, group = ("192.0.2.1", "224.0.0.1") if family == socket.AF_INET else ("2001:db8::1", "ff0e::1")
    found = []
    for index in [0, *(index for index, _ in socket.if_nameindex())]:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            elif index:  # struct ip_mreqn; on Windows, an address 0.x.x.x
                form = "!I" if sys.platform == "win32" else "8xi"
                probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack(form, index))
            probe.connect((group if index else elsewhere, 9))
            found.append(probe.getsockname()[0])
    addresses = {address: plain_address(address) for address in found}
    return [text for text, address in addresses.items() if is_reachable(address)]


def is_reachable(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether others may use an address: an IPv6 one that is link-local needs the name of an interface of theirs."""
    return not (address.is_loopback or address.is_unspecified or (address.version == 6 and address.is_link_local))


class Interrupts:
    """What SIGINT, SIGTERM, SIGHUP, SIGQUIT and SIGBREAK do to a client: within `with`, they end its loop, which
    restores the terminal, and raise nothing; outside, they raise KeyboardInterrupt. All but the first do nothing."""

    SIGNALS = tuple(
        getattr(signal, name)
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGBREAK")
        if hasattr(signal, name)
    )

    def __init__(self, client: Client) -> None:
        self._client = client
        self._looping = False
        self.terminal: Terminal | None = None
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._interrupt)

    def __enter__(self) -> None:
        self._looping = True
        self._client.wakeup.wake_on_signals()

    def __exit__(self, *exc: object) -> None:
        self._looping = False

    def ignore(self) -> None:
        """No signal does anything any more."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)

    def _interrupt(self, number: int, _: object) -> None:
        if self._client.interrupted:
            return
        if number == signal.SIGINT and self._looping and self.terminal and self.terminal.interrupt():
            return
        self._client.interrupted = True
        if not self._looping:
            raise KeyboardInterrupt
        with contextlib.suppress(RuntimeError):  # no more threads
            _thread.start_new_thread(end_soon, (130, self.terminal))


def end_soon(status: int, terminal: Terminal | None) -> None:
    """Ends the program after END_S: perhaps a terminal or a pipe takes nothing, and holds up what would end it."""
    time.sleep(END_S)
    try:
        if terminal:
            terminal.restore()
    finally:
        os._exit(status)


def run_client(args: argparse.Namespace) -> int:
    """chat.py client"""
    nick, channel, key = names_from_args(args)
    password, context = read_password(args.password_file), tls_context(args)
    client = Client(args.host, args.port, nick, channel)
    client.dial = functools.partial(dial, args.host, args.port, context, args.fingerprint or "")
    client.password, client.reconnects, client.keys = password, args.reconnect, {fold(channel): key}
    client.typing.wanted = args.typing
    client.wanted_caps = WANTED_CAPS | (set() if args.joins else {SPEAK_CAP})
    interrupts, asked = Interrupts(client), 0
    try:
        while True:
            try:
                with interrupts, contextlib.ExitStack() as stack:
                    client.ui = ui_from_args(args, client, interrupts, stack)
                    return client.run()
            except PasswordRequired as error:
                person = is_terminal(sys.stdin)
                may_ask = asked < PASSWORD_TRIES if asked else not client.password  # none came from elsewhere
                if not (person and may_ask) or client.entered or client.interrupted:
                    raise
                if asked:
                    print(f"*** {escape_controls(str(error))}", file=sys.stderr)
            client.password, asked = normalize_password(getpass.getpass(f"password for {client.where}: ")), asked + 1
    finally:
        interrupts.ignore()
        client.wakeup.close()


def tls_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    """What our end of each connection encrypts with; None for clear text."""
    if not (args.tls or args.fingerprint):
        return None
    try:
        return client_context(bool(args.fingerprint))
    except ImportError as error:
        raise FatalError(f"this Python has no TLS: {error}") from None


def names_from_args(args: argparse.Namespace) -> tuple[str, str, str]:
    """Our name, the channel and its key ('' for none), all fit to be sent; raises FatalError."""
    channel, _, key = args.channel.partition(" ")
    channel = with_channel_type(channel)
    try:
        nick = check_nick(args.name)
        channel = channel[0] + check_channel(f"#{channel[1:]}")[1:]  # what else a server wants of it, it will say
    except CommandError as refused:
        raise FatalError(refused.numeric.text.format()) from None
    key = key.strip()
    if key and not is_word(key, LINE_BYTES // 2):
        raise FatalError("a channel's key is one word without a comma")
    return nick, channel, key


def ui_from_args(
    args: argparse.Namespace, client: Client, interrupts: Interrupts, stack: contextlib.ExitStack
) -> UserInterface:
    """A line editor for a person at a terminal; otherwise lines."""
    client.replay = args.replay or 0
    if args.message is not None:
        return PipeUI(client, io.BytesIO(os.fsencode("\n".join(args.message))), as_json=args.json, quiet=True)
    if not has_terminal() or args.json:
        person = is_terminal(sys.stdin)
        source = sys.stdin and getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
        return PipeUI(client, source, commands=person, as_json=args.json)
    client.replay = REPLAY_LINES if args.replay is None else args.replay
    terminal = interrupts.terminal = stack.enter_context(
        Terminal(client.wakeup, functools.partial(completions, client))
    )
    return TerminalUI(client, terminal)


def is_regular_file(stream: Any) -> bool:
    """Whether a stream, which may be None, is written into a file."""
    with contextlib.suppress(AttributeError, OSError):
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    return False


@contextlib.contextmanager
def naming(option: str, path: str) -> Iterator[None]:
    """Has an error with a file raised as FatalError that names the option."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeError) else error.strerror or error
        raise FatalError(f"{option} {path}: {reason}") from None


def read_password(path: str | None) -> str:
    """The first line of a file, what is typed for -, CHAT_PASSWORD, or ''. Never an argument: those can be listed."""
    if path is None:
        return normalize_password(os.environ.get("CHAT_PASSWORD", ""))
    if path == "-":
        password = getpass.getpass("password: ")
    else:
        with naming("--password-file", path), open(path, "rb") as file:
            data = file.readline()
            if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise FatalError(f"--password-file {path}: it is UTF-16; save it as UTF-8")
            password = data.decode().rstrip("\r\n")
    password = normalize_password(password)
    if not password:
        raise FatalError(f"there is no password in {path}")
    return password


def check_password(password: str) -> None:
    """Raises FatalError for a password that clients of some dialect could not give."""
    categories = set(map(unicodedata.category, password))
    if "Cs" in categories:  # bytes of the environment that could not be decoded
        raise FatalError("the password cannot be used: it is not UTF-8 text")
    if "Cc" in categories:
        raise FatalError("the password cannot be used: there is a control character in it, which cannot be typed")
    if len(password.encode()) > PASSWORD_BYTES:
        raise FatalError(f"the password cannot be used: an IRC line has room for {PASSWORD_BYTES} bytes of it")
    if password.strip() == "exit":
        raise FatalError("the password cannot be used: whoever types exit leaves")


def irc_url(text: str) -> dict[str, Any]:
    """The type of an argument irc://[nick@]host[:port]/[channel[?key]]; ircs is with TLS: draft-butcher-irc-url."""
    form = r"(ircs?)://(?:([^/@]*)@)?(\[[0-9a-f:.]+\]|[^][/:@?#]+)(?::([0-9]{1,5}))?(?:/([^?]*)(?:\?(.*))?)?"
    match = re.fullmatch(form, text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError("it is irc://[nick@]host[:port]/[channel[?key]]")
    parts = [urllib.parse.unquote(part or "") for part in match.groups()]
    if not all(is_word(part, LINE_BYTES) for part in parts if part):  # they become words of what we send
        raise argparse.ArgumentTypeError("its parts cannot contain a space, a comma or a control character")
    scheme, user, host, port, channel, key = parts
    if ":" in user:
        raise argparse.ArgumentTypeError("others can read a password here: use --password-file or CHAT_PASSWORD")
    found: dict[str, Any] = {"host": host.strip("[]"), "port": IRC_PORT}
    if scheme.lower() == "ircs":
        found.update(port=IRC_TLS_PORT, tls=True)
    if port:
        found["port"] = int_between(1, 65535)(port)
    if user:
        found["name"] = user
    if channel:
        found["channel"] = f"{channel} {key}"
    return found


def run_history(args: argparse.Namespace) -> int:
    """chat.py history"""
    if not os.path.exists(args.file):
        raise FatalError(f"there is no {args.file}")
    channel = fold(with_channel_type(args.channel)) if args.channel else ""
    with contextlib.closing(SqliteHistory(args.file, readonly=True)) as history:
        for message in history.transcript(args.since, channel):
            if args.json:
                write_json(message)
            else:
                for line in each_line(message):
                    print(f"{timestamp(message)} {escape_controls(message.param(0))} {text_form(line)}")
    return 0


def timestamp(message: Message) -> str:
    """The local date and time of a message, as they stand in a file."""
    return time.strftime("%Y-%m-%d %H:%M:%S", local_time(message.tags.get("time", "")))


def write_json(message: Message) -> None:
    """Writes a message to standard output as a JSON object in UTF-8, whatever the locale; what a terminal could obey
    is escaped."""
    for line in JSON.encode(message).splitlines():
        text = json.dumps(json.loads(line), ensure_ascii=False)
        text = "".join(json.dumps(char)[1:-1] if is_unsafe(char) else char for char in text)
        sys.stdout.flush()
        sys.stdout.buffer.write(f"{text}\n".encode())
        sys.stdout.buffer.flush()


def parse_local_time(text: str) -> float:
    """The type of an argument that is a local time."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError("it is a local time such as 2026-01-31 or 2026-01-31T12:00") from None


def web_origins(text: str) -> list[str]:
    """The type of an argument that is a list of origins of pages (RFC 6454)."""
    origins = [item.strip().rstrip("/").lower() for item in text.split(",")]
    if not all(re.fullmatch(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?", origin) for origin in origins):
        raise argparse.ArgumentTypeError("it is https://HOST or https://HOST:PORT, with commas between several")
    return origins


def login_name() -> str:
    """The login name as far as it can be a nick."""
    try:
        return check_nick(re.sub(r"[^\w-]", "", getpass.getuser()).lstrip("-0123456789")[:NICK_CHARS])
    except (OSError, KeyError, ImportError, CommandError):
        return "guest"


def fingerprint(text: str) -> str:
    """The type of an argument that is a SHA-256."""
    digits = text.replace(":", "").upper()
    if not re.fullmatch("[0-9A-F]{64}", digits):
        raise argparse.ArgumentTypeError("must be 64 hexadecimal digits, as the server's own terminal shows them")
    return ":".join(digits[start : start + 2] for start in range(0, 64, 2))


def positive(text: str) -> float:
    """The type of an argument that is a number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number >= 0.01:
        raise argparse.ArgumentTypeError(f"it must be a number of at least 0.01, not {text}")
    return number


def int_between(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `low` to `high`."""

    def convert(text: str) -> int:
        if not (re.fullmatch("[0-9]{1,9}", text) and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"it must be a whole number from {low} to {high}, not {text}")
        return int(text)

    return convert


EXAMPLES = f"""\
{PYTHON} chat.py server                   lets people on this machine join; --host 0.0.0.0 opens it to the network
{PYTHON} chat.py client --name bob        joins a chat on this machine
{PYTHON} chat.py client bob@192.168.1.20  joins one on another machine; --help tells more"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and name the flag that is most similar to one that is not known."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {escape_controls(message)}; {self.prog} --help tells more\n")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(*args, **kwargs)
        for word in unknown:
            flag = word.partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            self.error(f"{flag} is not known" + (f": did you mean {near[0]}?" if near else ""))
        return found, unknown


class Target(argparse.Action):
    """Takes HOST, HOST PORT, HOST:PORT, NICK@HOST, NICK@HOST:PORT or an irc:// address."""

    def __call__(self, parser: argparse.ArgumentParser, args: Any, values: Any, option: str | None = None) -> None:
        words = [values] if isinstance(values, str) else values
        try:
            vars(args).update(target_from_words(*words) if words else {})
        except argparse.ArgumentTypeError as error:
            parser.error(f"{option or 'ADDRESS'}: {error}")


def target_from_words(address: str, port: str = "", *more: str) -> dict[str, Any]:
    """What `address` and `port` mean as arguments; raises ArgumentTypeError."""
    if "://" in address:
        return irc_url(address)
    nick, at, rest = address.rpartition("@")
    match = re.fullmatch(
        r"(?:\[(.+)\]|([^:]+))(?::(\w+))?|([^][]*:[^][]*:[^][]*)", rest
    )  # the last one: IPv6 without brackets
    if not match or more or (match[3] and port):
        raise argparse.ArgumentTypeError("it is HOST, HOST PORT, HOST:PORT or NICK@HOST")
    found: dict[str, Any] = {"host": match[1] or match[2] or match[4]}
    if port or match[3]:
        found["port"] = int_between(0, 65535)(port or match[3])
    if at:
        found["name"] = nick
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(prog="chat.py", description="A small chat that is one file.")
    top.add_argument("--version", action="version", version=f"{VERSION}, Python {platform.python_version()}")
    modes = top.add_subparsers(metavar="server | client | history", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    text = "address, or address:port (default %(default)s)"
    shared.add_argument("--host", action=Target, default="127.0.0.1", metavar="HOST", help=text)
    port = int_between(0, 65535)
    shared.add_argument("-p", "--port", type=port, default=DEFAULT_PORT, help="TCP port (default %(default)s)")
    add_server(modes, shared)
    add_client(modes, shared)
    add_history(modes)
    return top


def add_server(modes: Any, shared: argparse.ArgumentParser) -> None:
    """The arguments of `chat.py server`."""
    server = modes.add_parser("server", parents=[shared], help="let people join", description="Lets people join.")
    add = server.add_argument
    add("--server-name", default=SERVER_NAME, metavar="NAME", help="in IRC replies (%(default)s)")
    add("--history", metavar="FILE", help="keep what is said in this SQLite file (default: in memory)")
    add("--fsync", action="store_true", help="keep it also when the machine loses its power")
    add("--keep", type=int_between(1, 36500), default=math.inf, metavar="DAYS", help="(default: for ever)")
    text = "for newcomers (%(default)s)"
    add("--replay", type=int_between(0, PAGE_LINES), default=REPLAY_LINES, metavar="N", help=text)
    add("--password-file", metavar="FILE", help="whose first line clients must know; - asks (or set CHAT_PASSWORD)")
    add("--log", metavar="FILE", help="log to FILE instead of standard error")
    add("-v", "--verbose", action="store_true", help="log more")
    add("--tls", action="store_true", help="encrypt for who asks for it, with a certificate that is made if need be")
    add("--tls-only", action="store_true", help="refuse clear text")
    add("--tls-cert", metavar="FILE", help="in PEM; the certificate to encrypt with")
    add("--tls-key", metavar="FILE", help="in PEM; its key, if that is not in the same file")
    text = "origins of pages that may talk to this server, for one behind a proxy: https://chat.example.org"
    add("--web-origin", type=web_origins, default=(), metavar="URL,...", help=text)
    add_limits(server.add_argument_group("limits"))
    server.set_defaults(run=run_server)


def add_limits(group: Any) -> None:
    """A flag for each limit."""
    for field in dataclasses.fields(Limits):
        flag, unit, text = (field.metadata[key] for key in ("flag", "unit", "help"))
        group.add_argument(flag, dest=field.name, type=positive, metavar=unit, help=f"{text} ({field.default:.0f})")
    group.add_argument("--no-limits", action="store_true", help="none but those that are given")
    text = "from where neither --max-per-address nor --rate counts (%(default)s)"
    group.add_argument("--exempt", default=LOOPBACK, metavar="NETWORK,...", help=text)


def add_client(modes: Any, shared: argparse.ArgumentParser) -> None:
    """The arguments of `chat.py client`."""
    client = modes.add_parser("client", parents=[shared], help="join a chat", description="Joins a chat.")
    add = client.add_argument
    text = "HOST, HOST PORT, HOST:PORT, NICK@HOST, or irc://[nick@]host[:port]/[channel[?key]], ircs:// with TLS"
    add("target", nargs="*", action=Target, metavar="ADDRESS", help=text)
    text = "what others call you (default: the login name)"
    add("--name", "--nick", "--user", default=login_name(), metavar="NAME", help=text)
    add("--channel", default=DEFAULT_CHANNEL, help="where to talk, '#x KEY' with a key (default %(default)s)")
    add("--password-file", metavar="FILE", help="its first line is the password; - asks (or set CHAT_PASSWORD)")
    add("--tls", action="store_true", help="encrypt; the server must have a certificate that this system trusts")
    text = "encrypt; the server must have the certificate with this SHA-256"
    add("--fingerprint", type=fingerprint, metavar="HEX", help=text)
    add("-m", "--message", action="append", metavar="TEXT", help="send this and leave")
    text = f"shown of what was said ({REPLAY_LINES}; in a pipe 0)"
    add("--replay", type=int_between(0, PAGE_LINES), metavar="N", help=text)
    add("--json", action="store_true", help="print events as JSON objects, one a line")
    text = "only speak: nobody is told of coming and going, and nothing is shown"
    add("--no-join", dest="joins", action="store_false", help=text)
    add("--no-typing", dest="typing", action="store_false", help="do not tell others that you are typing")
    add("--no-reconnect", dest="reconnect", action="store_false", help="end when the connection is lost")
    client.set_defaults(run=run_client)


def add_history(modes: Any) -> None:
    """The arguments of `chat.py history`."""
    history = modes.add_parser("history", help="print what was said", description="Prints what was said.")
    add = history.add_argument
    add("file", help="the server's --history")
    add("--since", type=parse_local_time, default=0.0, metavar="TIME", help="2026-01-31, 2026-01-31T12:00, local")
    add("--channel", help="only this one")
    add("--json", action="store_true", help="JSON objects, one a line")
    history.set_defaults(run=run_history)


def abandon_output() -> None:
    """Nobody reads the output any more: nor may its last flush complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(EXAMPLES, file=sys.stderr)
        return 2
    args = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no text may end the program because the terminal cannot show it
            stream.reconfigure(errors="backslashreplace")
            if sys.platform == "win32" and not is_terminal(stream):  # else files have the code page of older programs
                stream.reconfigure(encoding="utf-8")
    try:
        return int(args.run(args))
    except (KeyboardInterrupt, EOFError):  # while a password was asked for
        return 130
    except (FatalError, StorageError, UnicodeError, *TERMINAL_ERRORS) as failed:
        unread = errno.EINVAL if sys.platform == "win32" else errno.EPIPE
        if getattr(failed, "errno", None) == unread:
            abandon_output()
            return 1
        print(f"chat.py: {escape_controls(str(failed))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
