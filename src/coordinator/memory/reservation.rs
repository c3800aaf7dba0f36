//! Memory for what is about to be granted. It is reserved before anything is logged, and piece by piece: gigabytes take the kernel
//! a second, and others are served in between (SPEC §7.4). Nobody knows of it yet: it goes with the coordinator, with the participant
//! who asked, or when that has a new connection. Who only hangs up gets what he asked for.

use std::os::fd::OwnedFd;

use super::pages_of;
use crate::coordinator::protocol::TopicInfo;
use crate::coordinator::state::Aside;
use crate::error::Refusal;
use crate::os::memfd::free_elsewhere;
use crate::shm::segment::{Kind, NewSegment, Promise, Segment};
use crate::shm::topic;

/// A segment that is to be made.
pub(crate) struct Wanted {
    topic: String,
    part: String,
    pub(super) promise: Promise,
}

impl Wanted {
    pub(super) fn new(info: &TopicInfo, part: String, promise: Promise) -> Wanted {
        Wanted { topic: info.name.clone(), part, promise }
    }

    fn begin(self) -> Result<Making, Refusal> {
        let name = format!("shmbus:{}:{}", self.topic, self.part);
        match NewSegment::begin(&name, self.promise.len_bytes, pages_of(&self.promise)) {
            Ok(segment) => Ok(Making { wanted: self, segment, formatted_slots: 0 }),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// The promise may have changed its numbers while the memory was reserved, as other topics came.
    fn is_like(&self, other: &Wanted) -> bool {
        (&self.topic, &self.part, self.promise.len_bytes) == (&other.topic, &other.part, other.promise.len_bytes)
    }

    fn failed(&self, error: &std::io::Error) -> Refusal {
        let context = format!("cannot reserve {} bytes for topic {:?}", self.promise.len_bytes, self.topic);
        Refusal::System { context, problem: error.to_string() }
    }
}

/// A segment that is being made.
struct Making {
    wanted: Wanted,
    segment: NewSegment,
    formatted_slots: u64,
}

impl Making {
    fn reserve(&mut self, bytes: u64) -> Result<(), Refusal> {
        self.segment.reserve(bytes).map_err(|error| self.wanted.failed(&error))?;
        if self.wanted.promise.kind == Kind::Channel {
            // Of all that is formatted, a channel's slots alone are as many as its user likes.
            let geometry = &self.wanted.promise.geometry;
            let slots = geometry.channel_slots_within(self.segment.reserved_bytes());
            topic::format_channel(self.segment.segment(), geometry, self.formatted_slots..slots);
            self.formatted_slots = slots;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(OwnedFd, Segment), Refusal> {
        self.reserve(self.segment.missing_bytes())?;
        self.segment.finish().map_err(|error| self.wanted.failed(&error))
    }
}

/// What is reserved for one request, as far as it has come.
#[derive(Default)]
pub(crate) struct Reservation {
    /// To whose limits it counts.
    payer: u32,
    segments: Vec<Making>,
}

impl Reservation {
    /// Begins with all of `wanted`.
    pub(crate) fn begin(payer: u32, wanted: Vec<Wanted>) -> Result<Reservation, Refusal> {
        Ok(Reservation { payer, segments: wanted.into_iter().map(Wanted::begin).collect::<Result<_, _>>()? })
    }

    /// Whether it is for what is `wanted` now.
    pub(crate) fn is_for(&self, payer: u32, wanted: &[Wanted]) -> bool {
        let alike = self.segments.iter().zip(wanted).all(|(made, wanted)| made.wanted.is_like(wanted));
        self.payer == payer && self.segments.len() == wanted.len() && alike
    }

    /// Whether the same is being reserved here, or something that is to have the same number: another arena of the topic, another
    /// group.
    pub(crate) fn is_ahead_of(&self, payer: u32, wanted: &[Wanted]) -> bool {
        let rival = |made: &Making, wanted: &Wanted| {
            made.wanted.topic == wanted.topic && made.wanted.promise.kind == wanted.promise.kind
        };
        self.payer == payer && self.segments.iter().any(|made| wanted.iter().any(|wanted| rival(made, wanted)))
    }

    /// What counts to a user's limits.
    pub(crate) fn aside(&self, uid: u32) -> Aside {
        if uid != self.payer {
            return Aside::default();
        }
        let bytes = self.segments.iter().map(|made| made.wanted.promise.len_bytes).sum();
        Aside { bytes, segments: self.segments.len() }
    }

    pub(crate) fn missing_bytes(&self) -> u64 {
        self.segments.iter().map(|made| made.segment.missing_bytes()).sum()
    }

    /// Reserves about so many bytes more.
    pub(crate) fn reserve(&mut self, bytes: u64) -> Result<(), Refusal> {
        let mut rest = bytes;
        for made in &mut self.segments {
            let missing = made.segment.missing_bytes();
            made.reserve(rest)?;
            rest = rest.saturating_sub(missing - made.segment.missing_bytes());
        }
        Ok(())
    }

    /// Makes a segment of what was reserved for it. What was not is so now, in one go.
    pub(super) fn make(&mut self, wanted: Wanted) -> Result<(OwnedFd, Segment), Refusal> {
        let made = self.segments.iter().position(|made| made.wanted.is_like(&wanted));
        made.map_or_else(|| wanted.begin(), |index| Ok(self.segments.remove(index)))?.finish()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let bytes = self.segments.iter().map(|made| made.segment.reserved_bytes()).sum();
        free_elsewhere(bytes, std::mem::take(&mut self.segments));
    }
}
