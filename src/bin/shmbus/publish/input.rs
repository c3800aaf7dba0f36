//! Standard input, read through one large buffer and cut into messages in place.

use std::fs::File;
use std::io::{self, BufRead};
use std::os::fd::AsFd;

use nix::errno::Errno;
use shmbus::PublishError;

use crate::signals;

/// Smallest free space offered to one read.
const READ_BYTES: usize = 1 << 20;

/// Where one message ends and the next begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// After each newline.
    Lines,
    /// After this many bytes.
    Chunk(usize),
    /// At the end of input.
    Whole,
}

/// What [`Input::fill`] found.
pub(super) enum Filled {
    Some,
    End,
    /// This signal came before any input.
    Signal(i32),
}

pub(super) struct Input {
    cut: Cut,
    /// The largest message that can be published; a longer one is refused before all of it is in memory.
    max_message: u64,
    buffer: Vec<u8>,
    /// `buffer[..filled]` is read and not yet published.
    filled: usize,
    /// `buffer[..searched]` ends no message; a long line that comes in many pieces is searched but once.
    searched: usize,
    ended: bool,
    read_bytes: u64,
}

impl Input {
    pub(super) fn new(cut: Cut, max_message: u64) -> io::Result<Input> {
        Ok(Input { cut, max_message, buffer: Vec::new(), filled: 0, searched: 0, ended: false, read_bytes: 0 })
    }

    /// Length of standard input where it is a file.
    pub(super) fn len_hint(&self) -> Option<u64> {
        let file = File::from(io::stdin().as_fd().try_clone_to_owned().ok()?);
        file.metadata().ok().filter(|m| m.is_file()).map(|m| m.len())
    }

    /// Bytes read so far.
    pub(super) fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// One read of whatever is there. Everything complete is published before the next one, so no line waits for the
    /// line after it.
    pub(super) fn fill(&mut self) -> io::Result<Filled> {
        if self.buffer.len() < self.filled + READ_BYTES {
            self.buffer.resize((self.filled + READ_BYTES).max(self.buffer.len() * 2), 0);
        }
        let stdin = io::stdin();
        loop {
            if !signals::wait_readable(stdin.as_fd())? {
                return Ok(Filled::Signal(signals::caught().unwrap_or_default()));
            }
            match nix::unistd::read(&stdin, &mut self.buffer[self.filled..]) {
                Ok(0) => {
                    self.ended = true;
                    return Ok(Filled::End);
                }
                Ok(count) => {
                    self.filled += count;
                    self.read_bytes += count as u64;
                    return Ok(Filled::Some);
                }
                Err(Errno::EINTR | Errno::EAGAIN) => continue,
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Every complete message in the buffer, and how many bytes they take. At the end of input the rest is one too.
    pub(super) fn messages(&self) -> (Vec<&[u8]>, usize) {
        let filled = &self.buffer[..self.filled];
        let mut messages = Vec::new();
        let mut at = 0;
        let mut searched = self.searched;
        while let Some(len) = next_message(self.cut, &filled[at..], searched) {
            messages.push(&filled[at..at + len]);
            at += len;
            searched = 0;
        }
        // An empty input is one empty message only where it was to be one message.
        if self.ended && (at < self.filled || self.cut == Cut::Whole) {
            messages.push(&filled[at..]);
            at = self.filled;
        }
        (messages, at)
    }

    /// Forgets the first `count` bytes: all that [`Input::messages`] gave out.
    pub(super) fn consume(&mut self, count: usize) {
        self.buffer.copy_within(count..self.filled, 0);
        self.filled -= count;
        self.searched = self.filled;
    }

    /// Refuses a message that is already longer than any the topic takes.
    pub(super) fn check_room(&self) -> Result<(), PublishError> {
        let found = match self.cut {
            Cut::Chunk(bytes) => bytes as u64,
            Cut::Lines | Cut::Whole => self.filled as u64,
        };
        if found <= self.max_message { Ok(()) } else { Err(PublishError::TooLarge { found, max: self.max_message }) }
    }
}

/// Length of the first message in `bytes`, if all of it is there; it does not end within the first `searched` bytes.
fn next_message(cut: Cut, bytes: &[u8], searched: usize) -> Option<usize> {
    match cut {
        Cut::Lines => {
            let mut rest = &bytes[searched..];
            let len = searched + rest.skip_until(b'\n').ok()?; // the standard library's memchr
            (len > searched && bytes[len - 1] == b'\n').then_some(len)
        }
        Cut::Chunk(len) => (bytes.len() >= len).then_some(len),
        Cut::Whole => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(cut: Cut, bytes: &[u8], ended: bool) -> (Vec<Vec<u8>>, usize) {
        let mut input = Input::new(cut, 1 << 20).unwrap();
        input.buffer = bytes.to_vec();
        input.filled = bytes.len();
        input.ended = ended;
        let (messages, consumed) = input.messages();
        (messages.into_iter().map(<[u8]>::to_vec).collect(), consumed)
    }

    #[test]
    fn lines_keep_every_byte() {
        assert_eq!(
            cut(Cut::Lines, b"a\r\n\n\0\xff\nrest", false),
            (vec![b"a\r\n".into(), b"\n".into(), b"\0\xff\n".into()], 7)
        );
        assert_eq!(cut(Cut::Lines, b"rest", true), (vec![b"rest".into()], 4));
        assert_eq!(cut(Cut::Lines, b"", true), (vec![], 0));
    }

    #[test]
    fn a_line_in_pieces_is_one_message() {
        let mut input = Input::new(Cut::Lines, 1 << 20).unwrap();
        for (piece, expected) in [("\nfir", vec!["\n"]), ("st", vec![]), ("\n", vec!["first\n"]), ("\n", vec!["\n"])] {
            input.buffer.truncate(input.filled);
            input.buffer.extend(piece.bytes());
            input.filled = input.buffer.len();
            let (messages, consumed) = input.messages();
            assert_eq!(messages, expected.iter().map(|m| m.as_bytes()).collect::<Vec<_>>(), "{piece:?}");
            input.consume(consumed);
        }
        assert_eq!(input.filled, 0);
    }

    #[test]
    fn chunks_and_whole() {
        assert_eq!(cut(Cut::Chunk(2), b"abcde", false), (vec![b"ab".into(), b"cd".into()], 4));
        assert_eq!(cut(Cut::Chunk(2), b"abc", true), (vec![b"ab".into(), b"c".into()], 3));
        assert_eq!(cut(Cut::Whole, b"abc", false), (vec![], 0));
        assert_eq!(cut(Cut::Whole, b"", true), (vec![vec![]], 0));
    }
}
