//! A channel's receiver.

use super::in_place::{fits_slots, inline_in_place, span_in_place};
use super::{Found, Glance, Lengths, Origin, ReadPort, Step, payload_at};
use crate::error::{GoneReason, RecvError};
use crate::ring::arena::Arena;
use crate::ring::doorbell::Doorbell;
use crate::ring::log::Place;
use crate::ring::slot::{Kind, Slot};
use crate::ring::spsc;
use crate::shm::shared::Shared;
use crate::shm::topic::SharedInfo;

/// A channel's receiver.
pub(crate) struct ChannelPort<const W: usize> {
    receiver: spsc::Receiver<W>,
    lengths: Lengths,
    in_place: bool,
    arena: Arena,
    /// Stand-alone receivers tell the sender good-bye; on a bus another receiver may follow.
    stand_alone: bool,
}

impl<const W: usize> ChannelPort<W> {
    pub(crate) fn new(channel: spsc::Channel<W>, info: &SharedInfo, arena: Arena, stand_alone: bool) -> Self {
        let (head, _) = channel.ends();
        let (lengths, in_place) = (Lengths::of(info), fits_slots(info));
        ChannelPort { receiver: spsc::Receiver::new(channel, head), lengths, in_place, arena, stand_alone }
    }
}

impl<const W: usize> ReadPort for ChannelPort<W> {
    #[inline(always)]
    fn poll_fast(&mut self, found: &mut Found) -> Glance {
        self.receiver.free();
        let Some(word) = self.receiver.poll() else {
            let gone = self.receiver.channel().header.readers.wants_attention();
            return if gone { Glance::Unclear } else { Glance::Nothing };
        };
        let len = word.length();
        let small = word.kind() == Kind::Inline && len <= Slot::<W>::INLINE_BYTES;
        if !small || !self.in_place || !self.lengths.allow(len as u64) {
            return Glance::Unclear;
        }
        found.set(self.receiver.next(), payload_at(self.receiver.slot().pointer(), len), Origin::default());
        self.receiver.step();
        Glance::Found
    }

    #[inline]
    fn poll(&mut self, found: &mut Found) -> Result<Step, RecvError> {
        self.receiver.free();
        let Some(word) = self.receiver.poll() else { return Ok(Step::Nothing) };
        let sequence = self.receiver.next();
        let slot = self.receiver.slot();
        let payload = if word.kind() == Kind::Inline {
            inline_in_place(slot, word, self.lengths, self.in_place, &mut found.buffer)?
        } else {
            span_in_place(slot, &self.arena, self.lengths)?
        };
        self.receiver.step();
        found.set(sequence, payload, Origin::default());
        Ok(Step::Found)
    }

    fn place(&self) -> Place {
        Place { position: self.receiver.next(), sequence: self.receiver.next() }
    }

    fn ring_len(&self) -> u64 {
        self.receiver.channel().slots()
    }

    fn is_ready(&mut self) -> bool {
        self.receiver.free();
        self.receiver.poll().is_some()
    }

    fn bell(&self) -> Shared<Doorbell> {
        self.receiver.channel().header.part(|header| &header.readers)
    }

    fn gone(&self) -> Option<GoneReason> {
        let header = &self.receiver.channel().header;
        if !header.readers.wants_attention() {
            return None;
        }
        header.ended().or_else(|| header.is_closed(spsc::End::Sender).then_some(GoneReason::Closed))
    }

    fn lag(&self) -> u64 {
        self.receiver.channel().ends().1.saturating_sub(self.receiver.next())
    }

    fn publisher_of(&self, _origin: Origin) -> Option<(u64, u64)> {
        None
    }

    fn leave(&mut self) {
        self.receiver.free();
        if self.stand_alone {
            self.receiver.channel().header.close(spsc::End::Receiver);
        }
    }
}
