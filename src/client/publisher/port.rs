//! A publisher's end of the ring.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::client::control::Control;
use crate::client::write::{self, ChannelEnd, ManyPort, Others, SlotPort, WritePort};
use crate::coordinator::protocol::{SegmentRef, TopicInfo};
use crate::error::AttachError;
use crate::ring::doorbell::Doorbell;
use crate::ring::{exclusive, many};
use crate::shm::segment::{Access, Segment};
use crate::shm::shared::Shared;
use crate::shm::topic::{self, LogSegments, SharedInfo};
use crate::topic::Mode;

/// The kinds of ring: closed, so that publishing is a branch and not an indirect call.
pub(super) enum Port {
    Exclusive(SlotPort<7, exclusive::Writer<7>>),
    ExclusiveSmall(SlotPort<1, exclusive::Writer<1>>),
    Many(ManyPort),
    Channel(SlotPort<7, ChannelEnd<7>>),
    ChannelSmall(SlotPort<1, ChannelEnd<1>>),
}

/// What a publisher has been given on its topic.
#[derive(Clone, Copy)]
pub(super) struct Tenure {
    pub(super) slot: u32,
    pub(super) publisher: u64,
    pub(super) opening: u64,
    pub(super) tenancy: u32,
    pub(super) last_number: Option<u64>,
}

impl Port {
    pub(super) fn space_bell(&self) -> Shared<Doorbell> {
        with_port!(self, port => port.space_bell())
    }

    /// Maps what the coordinator handed out.
    pub(super) fn attach(
        info: &SharedInfo,
        tenure: Tenure,
        named: &[SegmentRef],
        mut fds: Vec<OwnedFd>,
        control: &Arc<Control>,
    ) -> Result<Port, AttachError> {
        let Tenure { slot, publisher, opening, tenancy, last_number } = tenure;
        if info.options.mode == Mode::Channel {
            let fd = fds.first().ok_or_else(|| missing(0, 1))?;
            let segment = Segment::attach(fd.as_fd(), &info.channel(), Access::ReadWrite)?;
            return Ok(Port::channel(info, &segment, false));
        }
        let others = fds.split_off(fds.len().min(3));
        let [log, cursors, arena] = &fds[..] else { return Err(missing(fds.len(), 3)) };
        let others = Others::new(named.iter().skip(3).zip(others).filter_map(|(part, fd)| match part {
            SegmentRef::Arena(slot) => Some((*slot, fd)),
            _ => None,
        }));
        let others = if info.options.dedup { others.and_later(control.clone()) } else { others };
        let segments = LogSegments {
            log: Segment::attach(log.as_fd(), &info.log(), Access::ReadWrite)?,
            cursors: Segment::attach(cursors.as_fd(), &info.cursors(), Access::ReadWrite)?,
        };
        let arena = Segment::attach(arena.as_fd(), &info.arena(slot), Access::ReadWrite)?;
        let arena = topic::arena(&arena, &info.geometry);
        let messages = info.options.messages;
        let no_tail = || AttachError::Field { field: "checkpoints", found: 0, expected: 1 };
        Ok(match (info.options.mode, info.small_slots()) {
            (Mode::Exclusive, true) => {
                let log = segments.exclusive::<1>(info);
                let tail = log.tail().ok_or_else(no_tail)?;
                let writer = exclusive::Writer::new(log, info.policy(), tenancy as u8, tail);
                Port::ExclusiveSmall(write::exclusive(writer, arena, messages, info.options.dedup))
            }
            (Mode::Exclusive, false) => {
                let log = segments.exclusive::<7>(info);
                let tail = log.tail().ok_or_else(no_tail)?;
                let writer = exclusive::Writer::new(log, info.policy(), tenancy as u8, tail);
                Port::Exclusive(write::exclusive(writer, arena, messages, info.options.dedup))
            }
            _ => {
                let writer = many::Writer::new(segments.many(info), info.policy(), slot).ok_or_else(no_tail)?;
                let writer = writer.opened_as(opening, last_number);
                let before = last_number.unwrap_or(0);
                Port::Many(ManyPort::new(writer, info.clone(), slot, publisher, before, arena, others))
            }
        })
    }

    pub(super) fn channel(info: &TopicInfo, segment: &Segment, stand_alone: bool) -> Port {
        let messages = info.options.messages;
        if info.small_slots() {
            let (channel, arena) = topic::channel::<1>(segment, &info.geometry);
            Port::ChannelSmall(write::channel(channel, arena, messages, stand_alone))
        } else {
            let (channel, arena) = topic::channel::<7>(segment, &info.geometry);
            Port::Channel(write::channel(channel, arena, messages, stand_alone))
        }
    }
}

fn missing(found: usize, expected: u64) -> AttachError {
    AttachError::Descriptors { found: found as u64, expected }
}
