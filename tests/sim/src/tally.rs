//! What each frame is used for, recounted. Both audits fill a tally in from page tables and from books of their own, and
//! compare it with the words of the frame table.

use crate::machine::{HOLE_MARK, Seen};
use hv_core::addr::{DomainId, ENTRIES, Frame, HOLE_SLOTS, MAX_DOMAINS};
use hv_core::frame::{FrameTable, Info, Owner, Use};
use hv_core::machine::{Cpus, Frames};
use hv_core::paging::entry::{CACHE, GLOBAL, Target, USER, target};
use hv_core::paging::{Holding, Session, Sweep};
use std::ops::Index;

/// Nothing, or the first promise found broken, by its number.
pub type Found = Result<(), String>;

/// What a frame should look like.
#[derive(Clone, Debug)]
pub struct Expect {
    /// Uses, all of one kind.
    pub used_as: Use,
    /// How many.
    pub uses: u32,
    /// References besides those of uses and of ownership.
    plain: u32,
    /// How many of all those are of domains that do not own it.
    others: u16,
    /// Half way up or down, with so many entries counted.
    pub partial: Option<usize>,
    /// Pinned.
    pinned: bool,
    scanned: bool,
}

impl Expect {
    const NOTHING: Self =
        Self { used_as: Use::None, uses: 0, plain: 0, others: 0, partial: None, pinned: false, scanned: false };

    /// How many uses and references there are besides ownership.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.uses + self.plain
    }

    /// Whether a CPU that remembers the frame so does harm: it is something else now.
    #[must_use]
    pub fn is_harmed_by(&self, seen: Seen) -> bool {
        self.uses > 0 && seen.harms(self.used_as)
    }
}

/// What an audit knows of memory.
pub trait Memory {
    /// Looks at the words of a frame that are not zero, with their places.
    fn words<R>(&self, frame: Frame, look: impl FnOnce(&[(usize, u64)]) -> R) -> R;
    /// Whose a frame is; `None`: it is no RAM.
    fn owner(&self, frame: Frame) -> Option<Owner>;
    /// Whether the domain whose tables are followed may map a frame.
    ///
    /// # Errors
    /// The promise that is broken if not.
    fn mappable(&self, frame: Frame) -> Found;
}

/// What the frame table says of every frame, while nothing changes it.
#[derive(Default)]
pub struct Words(Vec<Info>);

impl Words {
    /// Reads the words of all frames anew.
    pub fn read(&mut self, table: &FrameTable) {
        self.0.clear();
        self.0.extend((0..table.limit()).map_while(|n| table.info(Frame::from_u32(n))));
    }

    /// How many frames there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// What it says of a frame; `None` above the limit.
    #[must_use]
    pub fn get(&self, frame: Frame) -> Option<Info> {
        self.0.get(frame.index()).copied()
    }

    /// All frames, with what it says of them.
    pub fn iter(&self) -> impl Iterator<Item = (Frame, Info)> {
        (0..).map(Frame::from_u32).zip(self.0.iter().copied())
    }
}

/// What all frames should look like.
#[derive(Default)]
pub struct Tally {
    expect: Vec<Expect>,
    todo: Vec<(Frame, u8)>,
    /// Domains whose frames leave them without being counted down.
    leaving: Vec<DomainId>,
}

impl Index<Frame> for Tally {
    type Output = Expect;
    fn index(&self, frame: Frame) -> &Expect {
        &self.expect[frame.index()]
    }
}

impl Tally {
    /// Begins anew, with frames that nobody uses.
    pub fn begin(&mut self, frames: usize) {
        self.leaving.clear();
        self.todo.clear();
        self.expect.clear();
        self.expect.resize(frames, Expect::NOTHING);
    }

    /// One more use of a frame.
    ///
    /// # Errors
    /// P1, P3.
    pub fn used(&mut self, frame: Frame, want: Use) -> Found {
        let Some(e) = self.expect.get_mut(frame.index()) else {
            return Err(format!("P3: {frame:?} is no RAM, but used as {want:?}"));
        };
        if e.uses > 0 && e.used_as != want {
            return Err(format!("P1: {frame:?} is used as {:?} and as {want:?}", e.used_as));
        }
        (e.used_as, e.uses) = (want, e.uses + 1);
        Ok(())
    }

    /// One more use of a frame as a table, whose entries count.
    ///
    /// # Errors
    /// As [`Tally::used`].
    pub fn table(&mut self, frame: Frame, level: u8) -> Found {
        self.used(frame, Use::table(level).ok_or("P3: a table below L1")?)?;
        self.todo.push((frame, level));
        Ok(())
    }

    /// A table is pinned.
    ///
    /// # Errors
    /// As [`Tally::used`].
    pub fn pinned(&mut self, frame: Frame, level: u8) -> Found {
        self.table(frame, level)?;
        self.expect[frame.index()].pinned = true;
        Ok(())
    }

    /// One more use of a frame for segment descriptors: of code and data for ring 3, or absent ones.
    ///
    /// # Errors
    /// P12, and as [`Tally::used`].
    pub fn descriptors(&mut self, frame: Frame, words: &[(usize, u64)]) -> Found {
        for (_, word) in words {
            let present = word >> 47 & 1 == 1;
            let system = word >> 44 & 1 == 0 && word >> 40 & 0xf != 0;
            if present && (system || word >> 44 & 1 == 1 && word >> 45 & 3 != 3) {
                return Err(format!("P12: {frame:?} holds descriptor {word:#x}"));
            }
        }
        self.used(frame, Use::Descriptors)
    }

    /// A domain holds a frame: by a leaf, a handle or a use of its own.
    ///
    /// # Errors
    /// As [`Tally::used`].
    pub fn held(&mut self, frame: Frame, owner: Option<Owner>, by: DomainId, writable: bool) -> Found {
        let other = matches!(owner, Some(Owner::Guest(id) | Owner::Lent(id)) if id != by);
        if writable {
            self.used(frame, Use::Writable)?;
        } else {
            self.expect[frame.index()].plain += 1;
        }
        self.expect[frame.index()].others += u16::from(other);
        Ok(())
    }

    /// What a domain's unfinished work holds. Answers how many tables are on their way.
    ///
    /// # Errors
    /// P8, and as [`Tally::used`].
    pub fn unfinished<M: Frames + Cpus>(&mut self, session: &Session<'_, M>) -> Result<usize, String> {
        let mut on_the_way = 0;
        for holding in session.holdings() {
            let (Holding::OnTheWay { table, level, .. } | Holding::Waiting { table, level }) = holding;
            self.table(table, level)?;
            if let Holding::OnTheWay { counted, .. } = holding {
                on_the_way += 1;
                if self.expect[table.index()].partial.replace(counted).is_some() {
                    return Err(format!("P8: {table:?} is on the way twice"));
                }
            }
        }
        Ok(on_the_way)
    }

    /// What the tables of a domain hold that were noted, and those they lead to. Of one being destroyed, `sweep` says how
    /// far that has come.
    ///
    /// # Errors
    /// The first promise found broken.
    pub fn follow(&mut self, memory: &impl Memory, id: DomainId, sweep: Option<Sweep>) -> Found {
        while let Some((table, level)) = self.todo.pop() {
            if std::mem::replace(&mut self.expect[table.index()].scanned, true) {
                continue;
            }
            if memory.owner(table) != Some(Owner::Guest(id)) {
                return Err(format!("P3: {id} uses {table:?} of {:?} as a table", memory.owner(table)));
            }
            let partial = self[table].partial;
            let swept = matches!(sweep, Some(Sweep::Tables(from)) if level == 1 && table.as_u32() < from);
            let hole = |slot: &usize| level == 4 && HOLE_SLOTS.contains(slot);
            memory.words(table, |words| {
                if level == 4 && partial.is_none() {
                    let ours: Vec<_> = words.iter().copied().filter(|(slot, _)| hole(slot)).collect();
                    let right = HOLE_SLOTS.map(|slot| (slot, HOLE_MARK | (slot - HOLE_SLOTS.start) as u64));
                    if !right.eq(ours.iter().copied()) {
                        return Err(format!("P3: root {table:?} has {ours:x?} in the hypervisor's slots"));
                    }
                }
                let counts =
                    |(slot, raw): &&(usize, u64)| !hole(slot) && *slot < partial.unwrap_or(ENTRIES) && raw & 1 != 0;
                words.iter().filter(counts).try_for_each(|&(slot, raw)| {
                    let found = self.entry(memory, id, level, raw, swept);
                    found.map_err(|why| format!("{why}: {id} {table:?} level {level} slot {slot} {raw:#x}"))
                })
            })?;
        }
        Ok(())
    }

    fn entry(&mut self, memory: &impl Memory, id: DomainId, level: u8, raw: u64, swept: bool) -> Found {
        if raw & USER == 0 || raw & GLOBAL != 0 {
            return Err("4.2: a bit no guest may set".into());
        }
        match target(raw, level) {
            Target::Nothing => Err("P3: leads beyond memory".into()),
            Target::Table(_) if raw & 0x180 != 0 => Err("XSA-148: a large page".into()),
            Target::Table(frame) => self.table(frame, level - 1),
            Target::Leaf { frame, .. } if swept && memory.owner(frame) != Some(Owner::Guest(id)) => Ok(()),
            Target::Leaf { frame, writable } => {
                memory.mappable(frame)?;
                match memory.owner(frame) {
                    None => Ok(()),
                    Some(_) if raw & CACHE != 0 => Err("XSA-402: RAM not write-back".into()),
                    owner => self.held(frame, owner, id, writable),
                }
            }
        }
    }

    /// A domain is being destroyed, and its tables hold nothing any more: what it held of its own frames goes with them.
    pub fn leaves(&mut self, id: DomainId) {
        self.leaving.push(id);
    }

    /// Whether nobody counts any more what holds a frame, because its owner is being destroyed.
    #[must_use]
    pub fn is_uncounted(&self, owner: Owner) -> bool {
        matches!(owner, Owner::Guest(id) if self.leaving.contains(&id))
    }

    /// Whether the words of a frame say what was counted; `kept`: somebody has it besides those who use it.
    ///
    /// # Errors
    /// P2, I6.
    pub fn agrees(&self, frame: Frame, info: Info, kept: bool) -> Found {
        let (e, kind, owner) = (&self[frame], info.kind, info.owner);
        let orphan = owner.owner == Owner::Orphan;
        if !orphan && owner.others != e.others {
            return Err(format!("P2: others hold {frame:?} as {owner:?}, but {e:?}"));
        }
        if self.is_uncounted(owner.owner) {
            return Ok(());
        }
        if owner.refs != e.held() + u32::from(kept) {
            return Err(format!("P2: {frame:?} has references {owner:?}, but {e:?}"));
        }
        if orphan && kind.count >= e.uses {
            return Ok(()); // some were those of the owner who is gone
        }
        if kind.count != e.uses || e.uses > 0 && kind.used_as != e.used_as || kind.pinned != e.pinned {
            return Err(format!("P2: {frame:?} has uses {kind:?}, but {e:?}"));
        }
        if e.uses > 0 && (kind.partial != e.partial.is_some() || kind.validated == kind.partial) {
            return Err(format!("I6: {frame:?} is {kind:?}, but {e:?}"));
        }
        if e.partial.is_some() && e.uses != 1 {
            return Err(format!("I6: {frame:?} is on its way and used: {e:?}"));
        }
        Ok(())
    }
}

/// P13: for each of the domains there are, the table counts as many frames as are its own by their words; and what is set
/// aside for them is free.
///
/// # Errors
/// What does not agree.
pub fn books(table: &FrameTable, words: &Words, free: u32, domains: &[DomainId]) -> Found {
    let mut owned = [0; MAX_DOMAINS as usize];
    for (_, info) in words.iter() {
        if let Owner::Guest(id) = info.owner.owner {
            owned[id.slot()] += 1;
        }
    }
    for id in domains {
        let (counted, own) = (table.owned(*id), owned[id.slot()]);
        if counted != own {
            return Err(format!("P13: {own} frames are {id}'s, and {counted} are counted"));
        }
    }
    let promised: u32 = domains.iter().map(|id| table.promised(*id)).sum();
    if promised > free || table.unpromised_frames() != free - promised {
        return Err(format!(
            "P13: {promised} frames are set aside and {} not, and {free} are free",
            table.unpromised_frames()
        ));
    }
    Ok(())
}
