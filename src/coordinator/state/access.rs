//! Who may do what (SPEC §7.1): decided from the kernel's word for who connected, as it was then.

use super::{Decider, GroupEntry, Participant, State, SubscriberEntry, TopicEntry};
use crate::access::{Access, Right};
use crate::coordinator::protocol::HandleRef;
use crate::error::Refusal;
use crate::os::socket::User;
use crate::topic::{Full, Mode};

/// How somebody may subscribe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reads {
    /// With a cursor among those that publishers look at.
    Shared,
    /// With a cursor of his own, which holds nobody back.
    Own,
}

impl TopicEntry {
    /// Whether a user has a right. Root and the topic's owner have all.
    pub(crate) fn grants(&self, right: Right, who: &Participant) -> bool {
        who.uid == 0 || who.uid == self.uid || self.access.allows(right, who.uid, &who.gids)
    }

    /// Whether a user sees it: with any right.
    pub(crate) fn is_seen_by(&self, who: &Participant) -> bool {
        Right::ALL.into_iter().any(|right| self.grants(right, who))
    }

    /// How a user may subscribe, if at all. Who publishes or consumes is trusted with memory that others of the topic use.
    pub(super) fn reads(&self, who: &Participant, droppable: bool) -> Option<Reads> {
        if self.grants(Right::Consume, who) {
            return Some(Reads::Shared);
        }
        if !self.grants(Right::Subscribe, who) {
            return None;
        }
        let options = &self.info.options;
        let holds_nobody = options.mode != Mode::Channel && (droppable || options.full == Full::Overwrite);
        match self.grants(Right::Publish, who) {
            true => Some(Reads::Shared),
            false => holds_nobody.then_some(Reads::Own),
        }
    }
}

impl State {
    /// Whether the bus was told to let a user in.
    pub(crate) fn allows(&self, user: &User) -> bool {
        self.allowed.iter().any(|who| who.is(user.uid, &user.gids))
    }

    /// Counts a subscriber's own cursors to its user, or does so no longer.
    pub(super) fn count_own_cursors(&mut self, subscriber: &SubscriberEntry, has: bool) {
        let uid = self.participants.get(&subscriber.incarnation).map(|who| who.uid);
        if let (Some(uid), Some(bytes)) = (uid, subscriber.own) {
            self.count_segment(uid, bytes, has);
        }
    }
}

impl Decider<'_> {
    fn me(&self) -> Option<&Participant> {
        self.state.participants.get(&self.incarnation)
    }

    pub(super) fn check_right(&self, entry: &TopicEntry, right: Right) -> Result<(), Refusal> {
        if self.me().is_some_and(|me| entry.grants(right, me)) {
            return Ok(());
        }
        Err(Refusal::NoRight { topic: entry.info.name.clone(), right, uid: self.uid, owner: entry.uid })
    }

    pub(super) fn sees(&self, entry: &TopicEntry) -> bool {
        self.me().is_some_and(|me| entry.is_seen_by(me))
    }

    pub(super) fn check_sees(&self, entry: &TopicEntry) -> Result<(), Refusal> {
        if self.sees(entry) { Ok(()) } else { self.check_right(entry, Right::Subscribe) }
    }

    /// Whether one may subscribe; the bytes of the cursors of his own that it takes, if he may have no others.
    pub(super) fn check_subscribe(&self, entry: &TopicEntry, droppable: bool) -> Result<Option<u64>, Refusal> {
        match self.me().and_then(|me| entry.reads(me, droppable)) {
            Some(Reads::Shared) => Ok(None),
            Some(Reads::Own) => {
                let bytes = (self.footprint.cursors)(&entry.info);
                self.check_own(&entry.info.name, self.uid, 1, bytes)?;
                Ok(Some(bytes))
            }
            None => {
                self.check_right(entry, Right::Subscribe)?;
                let mend = match entry.info.options.mode {
                    Mode::Channel => "a channel's reader writes to it".to_owned(),
                    _ => "subscribe with --droppable (`droppable()`)".to_owned(),
                };
                let topic = entry.info.name.clone();
                Err(Refusal::SubscribeOnly { topic, uid: self.uid, owner: entry.uid, mend })
            }
        }
    }

    /// Whether a user may have so many more segments for himself alone, of so many bytes together.
    pub(super) fn check_own(&self, name: &str, uid: u32, segments: u64, bytes: u64) -> Result<(), Refusal> {
        if segments == 0 {
            return Ok(());
        }
        self.check_budget(name, uid, bytes)?;
        self.check_owned(uid, 0, usize::try_from(segments).unwrap_or(usize::MAX))
    }

    /// Refuses a topic whose name a group sends its dead letters to, unless its creator may have what fails there: he would
    /// own, and so read, them all.
    pub(super) fn check_letters(&self, name: &str) -> Result<(), Refusal> {
        let Some(me) = self.me() else { return Ok(()) };
        for entry in self.state.topics.values() {
            let of_group =
                |group: &&GroupEntry| group.info.options.dead_letter_topic(&entry.info.name, &group.info.name) == name;
            let may_have = || entry.grants(Right::Consume, me) || entry.grants(Right::Administer, me);
            if let Some(group) = entry.living_groups().find(of_group).filter(|_| !may_have()) {
                let (topic, origin, group) = (name.to_owned(), entry.info.name.clone(), group.info.name.clone());
                return Err(Refusal::OthersLetters { topic, origin, group, uid: self.uid, owner: entry.uid });
            }
        }
        Ok(())
    }

    /// The same for a group that is about to be created, and the topic that is there already: nobody has chosen the name that
    /// a group's dead letters go to where none is given, so anybody may have taken it before.
    pub(super) fn check_letters_of(&self, entry: &TopicEntry, letters: &TopicEntry) -> Result<(), String> {
        let (owner, topic) = (letters.uid, &letters.info.name);
        let may = |right| entry.access.allows(right, owner, &[]);
        if owner == 0 || owner == entry.uid || owner == self.uid || may(Right::Consume) || may(Right::Administer) {
            return Ok(());
        }
        let problem = format!(
            "the dead-letter topic {topic:?} is user {owner}'s, who may not consume here and would read what fails"
        );
        Err(format!("{problem}; remove it, name another, or name this one if that is meant"))
    }

    /// The list of a topic that a consumer creates for the dead letters of a group of his.
    pub(super) fn access_of_dead_letters(&self, name: &str) -> Option<Access> {
        self.me()?.handles.iter().find_map(|handle| {
            let HandleRef::Consumer { topic, group, .. } = *handle else { return None };
            let (entry, group) = (self.state.topics.get(&topic)?, self.state.group(topic, group)?);
            let letters = group.info.options.dead_letter_topic(&entry.info.name, &group.info.name);
            (letters == name).then(|| entry.access.of_dead_letters(entry.uid))
        })
    }
}
