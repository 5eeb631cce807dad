//! Grants.

use hypercall_abi::grant::{
    GrantOp, MapGrantRef, QuerySize, SetupTable, UnmapAndReplace, UnmapGrantRef, entry, map, status,
};
use hypercall_abi::{Errno, Hypercall, domid};
use sim::world::build::{self, at, page};
use sim::world::script::{Actor, Stage, tell};

pub(crate) fn grant(stage: &Stage, from: &Actor, to: &Actor) {
    let table = stage.domain(from).grants.table_frames().next().expect("it has a table");
    let word = u64::from(entry::PERMIT_ACCESS) | u64::from(to.id.0) << 16 | from.pages[page::DATA].number() << 32;
    stage.m.poke(table, 5, word);
}

/// A domain that has granted nothing yet, but has a table.
pub(crate) fn granter(stage: &mut Stage) -> Actor {
    let owner = stage.enter(false);
    let frame_list = at(page::MORE_ARGS);
    let setup = SetupTable { dom: domid::SELF, nr_frames: 1, frame_list, ..Default::default() };
    let arg = stage.put(&owner, 0, &setup);
    let went = stage.call(&owner, Hypercall::GrantTableOp, &[GrantOp::SetupTable as u64, arg, 1]);
    assert_eq!(went.result, Ok(0));
    owner
}

fn map_grant_at(stage: &mut Stage, who: &Actor, of: &Actor, host_addr: u64, flags: u32) -> MapGrantRef {
    let call = MapGrantRef { host_addr, flags, gref: 5, dom: of.id.0, ..Default::default() };
    let arg = stage.put(who, 512, &call);
    let went = stage.call(who, Hypercall::GrantTableOp, &[GrantOp::MapGrantRef as u64, arg, 1]);
    assert_eq!(went.result, Ok(0));
    stage.get(who, arg)
}

pub(crate) fn map_grant(stage: &mut Stage, who: &Actor, of: &Actor) -> i16 {
    map_grant_at(stage, who, of, at(build::PAGES + 1), map::HOST).status
}

/// An entry in use was given to whoever it named by then: the recorded grantee counts (ABI io 1.4, step 2; XSA-230).
#[test]
fn a_grant_in_use_is_for_the_one_who_uses_it() {
    tell(300, |stage| {
        let [owner, first, second] = [granter(stage), stage.enter(false), stage.enter(false)];
        grant(stage, &owner, &first);
        assert_eq!(map_grant(stage, &first, &owner), status::OKAY);
        grant(stage, &owner, &second);
        assert_eq!(map_grant(stage, &second, &owner), status::GENERAL_ERROR);
    });
}

/// An entry named by its machine address was taken for a page if it was the first of its table, and a page that was named
/// by an address inside it for an entry: neither could be unmapped again (ABI io 1.3).
#[test]
fn a_grant_is_unmapped_where_it_was_mapped() {
    tell(300, |stage| {
        let [owner, user] = [granter(stage), stage.enter(false)];
        grant(stage, &owner, &user);
        let first_entry = user.pages[page::L1].address();
        let by_entry = map::HOST | map::CONTAINS_PTE;
        let inside = at(build::PAGES + 1) + 24;
        for (host_addr, flags) in [(first_entry, by_entry), (first_entry + 8 * 30, by_entry), (inside, map::HOST)] {
            let mapped = map_grant_at(stage, &user, &owner, host_addr, flags);
            assert_eq!(mapped.status, status::OKAY);
            let call = UnmapGrantRef { host_addr, handle: mapped.handle, ..Default::default() };
            let arg = stage.put(&user, 512, &call);
            let went = stage.call(&user, Hypercall::GrantTableOp, &[GrantOp::UnmapGrantRef as u64, arg, 1]);
            assert_eq!(went.result, Ok(0));
            assert_eq!(stage.get::<UnmapGrantRef>(&user, arg).status, status::OKAY, "at {host_addr:#x}");
        }
    });
}

fn replace_grant(stage: &mut Stage, user: &Actor, host_addr: u64, new_addr: u64, handle: u32) -> i16 {
    let call = UnmapAndReplace { host_addr, new_addr, handle, ..Default::default() };
    let arg = stage.put(user, 512, &call);
    let went = stage.call(user, Hypercall::GrantTableOp, &[GrantOp::UnmapAndReplace as u64, arg, 1]);
    assert_eq!(went.result, Ok(0));
    stage.get::<UnmapAndReplace>(user, arg).status
}

/// unmap_and_replace was refused (ABI io 1.3): the entry of the second address takes the place of the mapping.
#[test]
fn a_grant_is_unmapped_and_another_page_takes_its_place() {
    tell(300, |stage| {
        let [owner, user] = [granter(stage), stage.enter(false)];
        grant(stage, &owner, &user);
        let (host, new) = (at(build::PAGES + 1), at(page::DATA + 3));
        stage.m.poke(user.pages[page::DATA + 3], 7, 0x77);
        let mapped = map_grant_at(stage, &user, &owner, host, map::HOST);
        assert_eq!(mapped.status, status::OKAY);
        for (at, by) in [(host, host), (host, 1 << 40), (host + 4096, new)] {
            assert_eq!(replace_grant(stage, &user, at, by, mapped.handle), status::GENERAL_ERROR, "{at:#x} by {by:#x}");
        }
        assert_eq!(replace_grant(stage, &user, host, new, mapped.handle), status::OKAY);
        let read = |stage: &mut Stage, at: u64| stage.on_cpu(&user, |ctx, _| ctx.read::<u64>(at));
        assert_eq!((read(stage, host + 56), read(stage, new)), (Ok(0x77), Err(Errno::Fault)));
        assert_eq!(replace_grant(stage, &user, host, new, mapped.handle), status::BAD_HANDLE);
        // Without a second address it unmaps.
        let mapped = map_grant_at(stage, &user, &owner, new, map::HOST);
        assert_eq!(replace_grant(stage, &user, new, 0, mapped.handle), status::OKAY);
        assert_eq!(read(stage, new), Err(Errno::Fault));
    });
}

/// A domain that had not set up its table had none, so that its references were bad, not merely unset (ABI io 1.3).
#[test]
fn a_domain_has_a_grant_table_from_the_start() {
    tell(300, |stage| {
        let [owner, user] = [stage.enter(false), stage.enter(false)];
        let query = stage.put(&owner, 0, &QuerySize { dom: domid::SELF, ..Default::default() });
        assert_eq!(stage.call(&owner, Hypercall::GrantTableOp, &[GrantOp::QuerySize as u64, query, 1]).result, Ok(0));
        assert_eq!(stage.get::<QuerySize>(&owner, query).nr_frames, 1);
        assert_eq!(map_grant(stage, &user, &owner), status::GENERAL_ERROR);
        grant(stage, &owner, &user);
        assert_eq!(map_grant(stage, &user, &owner), status::OKAY);
    });
}
