//! Where a bus is found in the file system: the socket directory, the socket, the lock and the registry (SPEC §7.2).
//!
//! Whoever holds the lock owns these names. Keeper and coordinator share one open file description of it, so the lock
//! ends with the last of them, and what dead processes left under these names is replaced by the next holder.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, Uid, access};

use crate::error::ConnectError;
use crate::os::{lock, socket};
use crate::topic::check_name;

/// Environment variable that names the socket directory.
pub(crate) const DIRECTORY_VARIABLE: &str = "SHMBUS_DIR";

/// Mode bits that let others put their own files there: everybody, or a group that was chosen for it.
const WRITABLE_BY_ALL: u32 = 0o002;
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// With this mode bit they cannot take away or replace what is not theirs.
const STICKY: u32 = 0o1000;

/// The names of one bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) bus: String,
    directory: PathBuf,
    socket: PathBuf,
    lock: PathBuf,
    registry: PathBuf,
    socket_is_given: bool,
    /// Whose directory it is.
    owner: u32,
}

impl Place {
    /// The names of `bus` in `directory`, or in the first of the usual ones that can be used. Creates the directory.
    pub(crate) fn find(bus: &str, directory: Option<&Path>) -> Result<Place, ConnectError> {
        check_name(bus).map_err(|source| ConnectError::Name { name: bus.to_owned(), source })?;
        let directory = directory.map_or_else(|| usual_directory(Some(bus)), Path::to_owned);
        if !directory.is_absolute() {
            return Err(refused(&directory, "is a relative path", "give the socket directory as an absolute path"));
        }
        let owner = create_and_check(&directory)?;
        let socket = directory.join(format!("{bus}.sock"));
        let len = socket.as_os_str().as_bytes().len();
        if len > socket::MAX_PATH_BYTES {
            let problem = format!("the socket path has {len} bytes, at most {} are possible", socket::MAX_PATH_BYTES);
            return Err(refused(&socket, &problem, "choose a shorter SHMBUS_DIR or bus name"));
        }
        let lock = directory.join(format!("{bus}.lock"));
        let registry = directory.join(format!("{bus}.registry"));
        Ok(Place { bus: bus.to_owned(), directory, socket, lock, registry, socket_is_given: false, owner })
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether a coordinator of this user may serve here: root, this user, and whose directory it is. Nobody else could put a
    /// socket there, but by way of them.
    pub(crate) fn trusts(&self, uid: u32) -> bool {
        uid == 0 || uid == Uid::effective().as_raw() || uid == self.owner
    }

    /// Whether this process could serve the bus, and be trusted by those who look for it here.
    pub(crate) fn may_serve(&self) -> bool {
        let us = Uid::effective().as_raw();
        (us == self.owner || us == 0) && access(&self.directory, AccessFlags::W_OK | AccessFlags::X_OK).is_ok()
    }

    /// Why there is no bus for who may not serve it.
    pub(crate) fn nobody_serves(&self) -> ConnectError {
        let us = Uid::effective();
        let problem = format!("no coordinator serves bus {:?} here, and this user ({us}) may not start one", self.bus);
        refused(&self.directory, &problem, "have its owner run `shmbus serve`, or set SHMBUS_DIR to another place")
    }

    /// Refuses to serve where nobody would believe us. Who may write the directory, as one of its group, may not yet serve there.
    pub(crate) fn check_serves(&self) -> Result<(), ConnectError> {
        let us = Uid::effective().as_raw();
        if us == self.owner || us == 0 {
            return Ok(());
        }
        let problem =
            format!("belongs to user {}, whom clients trust to serve here, and root; this is user {us}", self.owner);
        Err(refused(&self.directory, &problem, "have its owner serve, chown it, or set SHMBUS_DIR to another place"))
    }

    /// Lets everybody who can search the directory connect, or the owner alone: who it is the coordinator asks the kernel.
    pub(crate) fn open_socket(&self, to_others: bool) -> io::Result<()> {
        // Not by its name: in a directory that others may write it may be a link by now.
        let mut options = OpenOptions::new();
        let socket = options.read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(&self.socket)?;
        if !socket.metadata()?.file_type().is_socket() {
            return Err(io::Error::other(format!("{} is no socket", self.socket.display())));
        }
        let itself = format!("/proc/self/fd/{}", socket.as_raw_fd());
        fs::set_permissions(itself, Permissions::from_mode(if to_others { 0o666 } else { 0o600 }))
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The buses that have a socket, a lock or a registry in this directory.
    pub(crate) fn buses_in(directory: &Path) -> io::Result<Vec<String>> {
        let mut buses = std::collections::BTreeSet::new();
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name();
            let parts = name.to_str().and_then(|name| name.rsplit_once('.'));
            let bus = parts.filter(|(_, what)| matches!(*what, "sock" | "lock" | "registry")).map(|(bus, _)| bus);
            buses.extend(bus.filter(|bus| check_name(bus).is_ok()).map(str::to_owned));
        }
        Ok(buses.into_iter().collect())
    }

    /// The names that exist of this bus.
    pub(crate) fn names_present(&self) -> Vec<&Path> {
        [&self.socket, &self.lock, &self.registry]
            .into_iter()
            .map(PathBuf::as_path)
            .filter(|path| path.symlink_metadata().is_ok())
            .collect()
    }

    pub(crate) fn lock_path(&self) -> &Path {
        &self.lock
    }

    /// The registry's name, for whoever has the lock. It is removed when a bus ends in good order, and only then: while it
    /// is there, its bus may be taken up again.
    pub(crate) fn registry(&self) -> &Path {
        &self.registry
    }

    /// Takes the lock; `None` when somebody serves the bus.
    pub(crate) fn lock(&self) -> Result<Option<OwnedFd>, ConnectError> {
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
            let file = options.open(&self.lock).map_err(|source| self.io(&self.lock, "cannot open", source))?;
            let owner = file.metadata().map_err(|source| self.io(&self.lock, "cannot look at", source))?.uid();
            if !self.trusts(owner) {
                let problem = format!("belongs to user {owner}, who does not serve here");
                return Err(refused(&self.lock, &problem, "remove it, and ask him why he has put it there"));
            }
            if !lock::try_exclusive(file.as_fd()).map_err(|source| self.io(&self.lock, "cannot lock", source))? {
                return Ok(None);
            }
            // The holder before us may have removed the name between our open and our lock.
            if self.names(file.as_fd()).map_err(|source| self.io(&self.lock, "cannot look at", source))? {
                return Ok(Some(file.into()));
            }
        }
    }

    /// Listens in the place of whatever socket the dead left. Only with the lock.
    pub(crate) fn listen(&self) -> Result<OwnedFd, ConnectError> {
        remove(&self.socket).map_err(|source| self.io(&self.socket, "cannot remove the stale", source))?;
        socket::listen(&self.socket).map_err(|source| self.io(&self.socket, "cannot listen at", source))
    }

    /// The same place, whose socket a service manager made and will remove.
    pub(crate) fn with_given_socket(mut self) -> Place {
        self.socket_is_given = true;
        self
    }

    pub(crate) fn socket_is_given(&self) -> bool {
        self.socket_is_given
    }

    /// Removes all names, if they still belong to this lock; those of a successor stay.
    pub(crate) fn remove(&self, lock: BorrowedFd<'_>) -> io::Result<()> {
        if self.names(lock)? {
            // First: who finds nobody at the socket looks whether it is there.
            remove(&self.registry)?;
            remove(&self.registry.with_extension("registry-new"))?;
            if !self.socket_is_given {
                remove(&self.socket)?;
            }
            remove(&self.lock)?;
        }
        Ok(())
    }

    /// Whether anybody can still find who holds this lock. In doubt they can.
    pub(crate) fn leads_to(&self, lock: BorrowedFd<'_>) -> bool {
        let absent = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
        self.names(lock).unwrap_or(true) && !fs::symlink_metadata(&self.socket).is_err_and(absent)
    }

    /// Whether the lock's name still leads to this file.
    pub(crate) fn names(&self, lock: BorrowedFd<'_>) -> io::Result<bool> {
        let held = File::from(lock.try_clone_to_owned()?).metadata()?;
        match fs::symlink_metadata(&self.lock) {
            Ok(named) => Ok((named.dev(), named.ino()) == (held.dev(), held.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn io(&self, path: &Path, what: &str, source: io::Error) -> ConnectError {
        ConnectError::io(format!("bus {:?}: {what} {}", self.bus, path.display()), source)
    }
}

/// The socket directory that [`Place::find`] would use, checked and not created: it may not exist.
pub(crate) fn in_use(directory: Option<&Path>) -> Result<PathBuf, ConnectError> {
    let directory = directory.map_or_else(|| usual_directory(None), Path::to_owned);
    match fs::symlink_metadata(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(directory),
        _ => check(&directory).map(|_| directory),
    }
}

/// `$SHMBUS_DIR`, `/run/shmbus`, `$XDG_RUNTIME_DIR/shmbus`, else `/tmp/shmbus-UID`.
///
/// `/run/shmbus` where this process may serve a bus, or where the one it looks for (`None`: any) lets others connect.
fn usual_directory(bus: Option<&str>) -> PathBuf {
    if let Some(given) = std::env::var_os(DIRECTORY_VARIABLE).filter(|given| !given.is_empty()) {
        return given.into();
    }
    let system = Path::new("/run/shmbus");
    let socket = bus.map(|bus| system.join(format!("{bus}.sock")));
    let can_connect = || socket.as_ref().is_some_and(|socket| access(socket.as_path(), AccessFlags::W_OK).is_ok());
    let us = Uid::effective().as_raw();
    let is_ours = || us == 0 || fs::symlink_metadata(system).is_ok_and(|found| found.uid() == us);
    let can_serve = access(system, AccessFlags::W_OK | AccessFlags::X_OK).is_ok() && is_ours();
    if (can_serve || can_connect()) && check(system).is_ok() {
        return system.to_owned();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(runtime) if runtime.is_absolute() && runtime.is_dir() => runtime.join("shmbus"),
        _ => PathBuf::from(format!("/tmp/shmbus-{}", Uid::effective())),
    }
}

fn create_and_check(directory: &Path) -> Result<u32, ConnectError> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(ConnectError::io(format!("cannot create {}", directory.display()), error)),
    }
    check(directory)
}

/// Refuses a directory that is not what it should be; its owner. Ours and root's will do, and another user's where root alone can
/// have put it: a service's, say, in `/run`. A group may write there, if so configured: what it puts there nobody speaks to
/// ([`Place::trusts`]), though it can take names away. Everybody may, where the sticky bit keeps them from that.
fn check(directory: &Path) -> Result<u32, ConnectError> {
    let found = fs::symlink_metadata(directory)
        .map_err(|error| ConnectError::io(format!("cannot look at {}", directory.display()), error))?;
    let us = Uid::effective().as_raw();
    if !found.is_dir() {
        return Err(refused(directory, "is not a directory", "remove it, or set SHMBUS_DIR to another place"));
    }
    if found.uid() != us && found.uid() != 0 && !is_put_there_by_root(directory) {
        let problem = format!("belongs to user {}, expected {us} or root", found.uid());
        return Err(refused(directory, &problem, "set SHMBUS_DIR to a directory of your own"));
    }
    if found.mode() & WRITABLE_BY_ALL != 0 && found.mode() & STICKY == 0 {
        let problem =
            format!("is writable by everybody (mode {:04o}), who could take its names away", found.mode() & 0o7777);
        let mend =
            "make it 0700, for several users 0755, or 0750 or 0770 with a group, or set SHMBUS_DIR to another place";
        return Err(refused(directory, &problem, mend));
    }
    Ok(found.uid())
}

/// Whether nobody but root can have named this directory: everything above it is root's, and nobody else's to write.
fn is_put_there_by_root(directory: &Path) -> bool {
    let roots = |path: &Path| {
        let found = fs::symlink_metadata(path);
        found.is_ok_and(|found| found.is_dir() && found.uid() == 0 && found.mode() & WRITABLE_BY_OTHERS == 0)
    };
    directory.ancestors().skip(1).all(roots)
}

fn refused(path: &Path, problem: &str, mend: &'static str) -> ConnectError {
    ConnectError::Refused { path: path.to_owned(), problem: problem.to_owned(), mend }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_directory_is_created_private() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("bus");
        let place = Place::find("default", Some(&directory)).unwrap();
        assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o777, 0o700);
        assert_eq!(place.socket(), directory.join("default.sock"));
    }

    #[test]
    fn symlinks_files_and_open_directories_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let (link, file, open) = (root.path().join("link"), root.path().join("file"), root.path().join("open"));
        symlink(root.path(), &link).unwrap();
        fs::write(&file, "").unwrap();
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        for bad in [&link, &file, &open] {
            assert!(matches!(Place::find("b", Some(bad)), Err(ConnectError::Refused { .. })), "{}", bad.display());
        }
        assert!(matches!(Place::find("b", Some(Path::new("relative"))), Err(ConnectError::Refused { .. })));
        assert!(matches!(Place::find("../b", Some(root.path())), Err(ConnectError::Name { .. })));
        let long = Place::find(&"b".repeat(120), Some(root.path())).unwrap_err().to_string();
        assert!(long.contains("107"), "{long}");
    }

    #[test]
    fn one_holds_the_lock_and_a_successor_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let place = Place::find("b", Some(root.path())).unwrap();
        let first = place.lock().unwrap().unwrap();
        assert!(place.lock().unwrap().is_none());
        let listener = place.listen().unwrap();
        place.remove(first.as_fd()).unwrap();
        let second = place.lock().unwrap().expect("the name is free though the first lock is still held");
        let _second_listener = place.listen().unwrap();
        place.remove(first.as_fd()).unwrap();
        assert!(place.socket().exists(), "the successor's socket stays");
        drop((first, second, listener));
        assert!(place.lock().unwrap().is_some(), "what the dead left does not block");
        place.listen().unwrap();
    }
}
