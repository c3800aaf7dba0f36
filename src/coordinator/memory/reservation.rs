//! Memory for what is about to be granted. It is reserved before anything is logged, and piece by piece: gigabytes take the kernel
//! a second, and others are served in between (SPEC §7.4). Nobody knows of it yet, so it goes with the coordinator, if that dies,
//! or with the connection of who asked for it.

use std::os::fd::OwnedFd;

use crate::coordinator::protocol::TopicInfo;
use crate::coordinator::state::Aside;
use crate::error::Refusal;
use crate::os::memfd::free_elsewhere;
use crate::shm::segment::{Kind, NewSegment, Pages, Promise, Segment};

/// Longest segment of which the coordinator maps every page at once. It walks logs and ledgers when it repairs; of longer
/// ones, and of payloads, it touches little.
const POPULATED_BYTES: u64 = 64 << 20;

/// A segment that is to be made.
pub(crate) struct Wanted {
    pub(crate) topic: String,
    part: &'static str,
    pub(crate) promise: Promise,
}

impl Wanted {
    pub(super) fn new(info: &TopicInfo, part: &'static str, promise: Promise) -> Wanted {
        Wanted { topic: info.name.clone(), part, promise }
    }

    fn begin(&self) -> Result<NewSegment, Refusal> {
        let name = format!("shmbus:{}:{}", self.topic, self.part);
        NewSegment::begin(&name, self.promise.len_bytes, pages_of(&self.promise)).map_err(|error| self.failed(&error))
    }

    /// The promise may have changed its numbers while the memory was reserved, as other topics and slots were given away.
    fn is_like(&self, other: &Wanted) -> bool {
        (&self.topic, self.part, self.promise.len_bytes) == (&other.topic, other.part, other.promise.len_bytes)
    }

    fn failed(&self, error: &std::io::Error) -> Refusal {
        let context = format!("cannot reserve {} bytes for topic {:?}", self.promise.len_bytes, self.topic);
        Refusal::System { context, problem: error.to_string() }
    }
}

/// How the coordinator maps such a segment.
pub(super) fn pages_of(promise: &Promise) -> Pages {
    let is_walked = !matches!(promise.kind, Kind::Arena | Kind::Channel);
    if is_walked && promise.len_bytes <= POPULATED_BYTES { Pages::Populated } else { Pages::AsTouched }
}

/// What is reserved for one request, as far as it has come.
#[derive(Default)]
pub(crate) struct Reservation {
    /// To whose budget it counts.
    payer: u32,
    segments: Vec<(Wanted, NewSegment)>,
}

impl Reservation {
    /// Begins with all of `wanted`.
    pub(crate) fn begin(payer: u32, wanted: Vec<Wanted>) -> Result<Reservation, Refusal> {
        let begun = |wanted: Wanted| wanted.begin().map(|new| (wanted, new));
        Ok(Reservation { payer, segments: wanted.into_iter().map(begun).collect::<Result<_, _>>()? })
    }

    /// Whether it is for what is `wanted` now.
    pub(crate) fn is_for(&self, payer: u32, wanted: &[Wanted]) -> bool {
        let alike = self.segments.iter().zip(wanted).all(|((have, _), wanted)| have.is_like(wanted));
        self.payer == payer && self.segments.len() == wanted.len() && alike
    }

    /// What counts to a user's limits.
    pub(crate) fn aside(&self, uid: u32) -> Aside {
        if uid != self.payer {
            return Aside::default();
        }
        let bytes = self.segments.iter().map(|(wanted, _)| wanted.promise.len_bytes).sum();
        Aside { bytes, segments: self.segments.len() }
    }

    /// Bytes that have not been reserved yet.
    pub(crate) fn missing(&self) -> u64 {
        self.segments.iter().map(|(_, new)| new.missing()).sum()
    }

    /// Reserves up to about so many bytes more.
    pub(crate) fn reserve(&mut self, bytes: u64) -> Result<(), Refusal> {
        let mut rest = bytes;
        for (wanted, new) in &mut self.segments {
            let missing = new.missing();
            new.reserve(rest).map_err(|error| wanted.failed(&error))?;
            rest = rest.saturating_sub(missing - new.missing());
        }
        Ok(())
    }

    /// Makes a segment of what was reserved for it. What was not is so now, in one go.
    pub(super) fn make(&mut self, wanted: &Wanted) -> Result<(OwnedFd, Segment), Refusal> {
        let reserved = self.segments.iter().position(|(have, _)| have.is_like(wanted));
        let mut new = match reserved {
            Some(index) => self.segments.remove(index).1,
            None => wanted.begin()?,
        };
        let made = new.reserve(new.missing()).and_then(|()| new.finish());
        made.map_err(|error| wanted.failed(&error))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let bytes = self.aside(self.payer).bytes;
        free_elsewhere(bytes, std::mem::take(&mut self.segments));
    }
}
