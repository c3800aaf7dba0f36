//! Who may do what: the access list of a topic, and how users and groups are written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use nix::unistd::{Group, User};
use serde::{Deserialize, Serialize};

/// Entries of one list, at most: it is part of the topic's status, which goes in one packet.
const MAX_ENTRIES: usize = 256;

/// What one may do on a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Right {
    /// Publish. It includes looking into the ring: publishers of a topic trust each other not to garble it.
    Publish,
    /// Read without being able to write anything that others use. Alone it lets one read `droppable` only: who holds
    /// publishers back has `consume` or `publish`, too.
    Subscribe,
    /// Consume in the topic's groups, and subscribe like the topic's owner.
    Consume,
    /// Create, rewind and remove groups, purge and remove the topic.
    Administer,
}

impl Right {
    /// All of them.
    pub const ALL: [Right; 4] = [Right::Publish, Right::Subscribe, Right::Consume, Right::Administer];
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Right::Publish => "publish",
            Right::Subscribe => "subscribe",
            Right::Consume => "consume",
            Right::Administer => "administer",
        })
    }
}

impl FromStr for Right {
    type Err = String;

    fn from_str(text: &str) -> Result<Right, String> {
        let right = Right::ALL.into_iter().find(|right| right.to_string() == text);
        right.ok_or_else(|| format!("{text:?} is no right; publish, subscribe, consume and administer are"))
    }
}

/// Whom an entry is for. Written as a user's name or number, `@` and a group's name or number, or `*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Who {
    /// Everybody whom the bus lets in.
    Everybody,
    /// A user, by number.
    User(u32),
    /// A group, by number: whoever has it as group or supplementary group when he connects.
    Group(u32),
}

impl Who {
    pub(crate) fn is(self, uid: u32, gids: &[u32]) -> bool {
        match self {
            Who::Everybody => true,
            Who::User(user) => user == uid,
            Who::Group(group) => gids.contains(&group),
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Everybody => f.write_str("*"),
            Who::User(uid) => write!(f, "{uid}"),
            Who::Group(gid) => write!(f, "@{gid}"),
        }
    }
}

impl FromStr for Who {
    type Err = String;

    /// Looks names up on this machine.
    fn from_str(text: &str) -> Result<Who, String> {
        if text == "*" {
            return Ok(Who::Everybody);
        }
        if let Some(group) = text.strip_prefix('@') {
            let known = || Group::from_name(group).ok().flatten().map(|known| known.gid.as_raw());
            let gid = group.parse().ok().or_else(known);
            return gid.map(Who::Group).ok_or_else(|| format!("this machine has no group {group:?}"));
        }
        let known = || User::from_name(text).ok().flatten().map(|known| known.uid.as_raw());
        let uid = text.parse().ok().or_else(known);
        uid.map(Who::User).ok_or_else(|| format!("this machine has no user {text:?}; write a group as @NAME"))
    }
}

/// Who may do what on a topic, besides its owner (the user who creates it) and root, who may do everything.
///
/// An empty list, the default, lets nobody else in. Numbers, not names, count: they are compared with the kernel's word
/// for who is connected.
///
/// ```
/// # use shmbus::{Access, Right, Who};
/// let access = Access::new().allow(Right::Publish, Who::User(1000)).allow(Right::Subscribe, Who::Everybody);
/// assert_eq!(access.to_string(), "publish=1000 subscribe=*");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    grants: BTreeMap<Right, BTreeSet<Who>>,
}

impl Access {
    /// Nobody but owner and root.
    pub fn new() -> Access {
        Access::default()
    }

    /// Adds an entry.
    #[must_use]
    pub fn allow(mut self, right: Right, who: Who) -> Access {
        self.grants.entry(right).or_default().insert(who);
        self
    }

    /// Every entry.
    pub fn entries(&self) -> impl Iterator<Item = (Right, Who)> + '_ {
        self.grants.iter().flat_map(|(right, all)| all.iter().map(|who| (*right, *who)))
    }

    pub(crate) fn allows(&self, right: Right, uid: u32, gids: &[u32]) -> bool {
        self.grants.get(&right).is_some_and(|all| all.iter().any(|who| who.is(uid, gids)))
    }

    /// Whether it may be a topic's.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self.entries().count() {
            0..=MAX_ENTRIES => Ok(()),
            many => Err(format!("its access list has {many} entries, at most {MAX_ENTRIES} are possible; use a group")),
        }
    }

    /// The list of a topic's dead letters: whoever consumes there publishes here, and whoever administers there does
    /// everything here.
    pub(crate) fn of_dead_letters(&self, owner: u32) -> Access {
        let of = |right| self.grants.get(&right).into_iter().flatten().copied().chain([Who::User(owner)]);
        let mut letters = Access::new();
        letters.grants.insert(Right::Publish, of(Right::Consume).collect());
        for right in [Right::Subscribe, Right::Consume, Right::Administer] {
            letters.grants.insert(right, of(Right::Administer).collect());
        }
        letters
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (right, all)) in self.grants.iter().enumerate() {
            let all: Vec<String> = all.iter().map(Who::to_string).collect();
            write!(f, "{}{right}={}", if index > 0 { " " } else { "" }, all.join(","))?;
        }
        if self.grants.is_empty() { f.write_str("owner") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_written_and_read() {
        for (text, who) in
            [("*", Who::Everybody), ("1000", Who::User(1000)), ("@7", Who::Group(7)), ("root", Who::User(0))]
        {
            assert_eq!(text.parse(), Ok(who));
        }
        assert!("no such user".parse::<Who>().is_err());
        assert!("@no such group".parse::<Who>().is_err());
        assert_eq!("consume".parse(), Ok(Right::Consume));
        assert!("own".parse::<Right>().is_err());
    }

    #[test]
    fn who_consumes_may_publish_dead_letters() {
        let access = Access::new().allow(Right::Consume, Who::Group(7)).allow(Right::Administer, Who::User(3));
        let letters = access.of_dead_letters(5);
        assert_eq!(letters.to_string(), "publish=5,@7 subscribe=3,5 consume=3,5 administer=3,5");
        assert!(letters.allows(Right::Publish, 9, &[7]) && !letters.allows(Right::Subscribe, 9, &[7]));
    }
}
